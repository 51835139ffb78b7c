"""Weights that forward computes from stored tensors are constants: computed once, and then int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from runs import silent
from shares import every
from torch import nn
from training import qat_recipe, train

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import UnmatchedRuleError

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")

ROWS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Standardised(nn.Conv2d):
    """Its weight has a mean of 0 and a variance of 1 for each output."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        scale = self.weight.std((1, 2, 3), keepdim=True).add(1e-5)
        return F.conv2d(x, (self.weight - mean) / scale, self.bias, self.stride, self.padding)


class ByBatchNorm(nn.Conv2d):
    """The same by the kernel of a BatchNorm, as nets without norms have it."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Normed(nn.Linear):
    """Weight normalisation by hand, with a length for each output."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.length = nn.Parameter(torch.linspace(0.5, 2, self.out_features))

    def forward(self, x):
        direction = self.weight / self.weight.norm(dim=1, keepdim=True)
        return F.linear(x, self.length[:, None] * direction, self.bias)


class Queries(nn.Linear):
    """Queries and values have a bias, keys have none."""

    def __init__(self):
        super().__init__(8, 24, bias=False)
        self.q, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("k", torch.zeros(8), persistent=False)

    def forward(self, x):
        return F.linear(x, self.weight, torch.cat((self.q, self.k, self.v)))


class Table(nn.Module):
    """Several matrices in one tensor."""

    def __init__(self, take):
        super().__init__()
        self.take, self.table = take, nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x):
        return self.take(x, self.table)


TABLES = {
    "joined": lambda x, w: F.linear(x, torch.cat([w[0], w[1]])),
    "cut out": lambda x, w: F.linear(x, w[1]),
    "reshaped": lambda x, w: F.linear(x, w.view(24, 8)),
    "turned": lambda x, w: F.linear(x, w[2].t()),
    "parts": lambda x, w: x @ w.unbind(0)[0] + w.chunk(3)[1][0, 0],
    "product": lambda x, w: torch.matmul(x, w[0] @ w[1]),
    "normalised": lambda x, w: F.linear(x, F.normalize(w[0], dim=1)),
    "shared": lambda x, w: F.linear(x @ w[0], torch.cat([w[0], w[1]])),
}
LAYERS = {
    "standardised": lambda: Standardised(3, 8, 3, padding=1),
    "by batch norm": lambda: ByBatchNorm(3, 8, 3),
    "normed": lambda: Normed(8, 6),
    "bias": Queries,
    "scaled": lambda: net_of(
        lambda self, x: F.conv2d(x, self.conv.weight * 0.3, self.conv.bias * 2),
        conv=nn.Conv2d(3, 8, 1),
    ),
    "of a module": lambda: net_of(
        lambda self, x: F.linear(x, self.soft(self.fc.weight) * 4),
        fc=nn.Linear(8, 8),
        soft=nn.Softmax(0),
    ),
    "transposed": lambda: net_of(
        lambda self, x: F.conv_transpose2d(x, self.conv.weight.flip(-1) * 2, stride=2),
        conv=nn.ConvTranspose2d(3, 8, 2),
    ),
    **{name: (lambda take=take: Table(take)) for name, take in TABLES.items()},
}


def made(case):
    torch.manual_seed(0)
    layer = LAYERS[case]().eval()
    batch = IMAGES if any(p.dim() == 4 for p in layer.parameters()) else ROWS
    return nn.Sequential(layer, nn.ReLU()).eval(), batch


@pytest.mark.parametrize("case", every(5, LAYERS))
def test_a_weight_made_of_stored_tensors_is_the_weight_of_an_int8_layer(case, tmp_path):
    model, batch = made(case)
    plan = qrecipe.plan(model, recipe(base="builtin:x86-static-minmax"), batch)
    assert "float" not in {site.verdict for site in plan}
    assert all(site.name.startswith("0:") or site.op == "ReLU" for site in plan)
    assert plan.boundaries == 2
    for chosen in ("builtin:x86-static-minmax", qrecipe.suggest(model, batch)):
        converted = qrecipe.quantize(model, chosen, [batch] * 3, progress=silent)
        assert output_sqnr_db(model(batch), converted(batch)) > 25
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    again = made(case)[0]
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", again)
    assert torch.equal(loaded(batch), converted(batch))


def test_a_dynamic_layer_takes_such_a_weight_too():
    model, batch = made("normed")
    converted = qrecipe.quantize(model, "builtin:x86-dynamic", example_inputs=batch)
    assert qrecipe.plan(model, "builtin:x86-dynamic", batch)["0:linear"].mode == "dynamic"
    assert output_sqnr_db(model(batch), converted(batch)) > 30


@pytest.mark.parametrize("case", ["standardised", "joined", "bias"])
def test_in_training_such_a_weight_learns_in_float_and_the_plan_says_why(case):
    layer, batch = made(case)
    plain = nn.Linear(8, 8) if batch is ROWS else nn.Conv2d(3, 3, 1)
    model = nn.Sequential(plain, layer).eval()
    compiled = qrecipe.compile(model, qat_recipe(), batch)
    reasons = {site.name: site.reason for site in compiled.plan if site.verdict == "float"}
    layer = next(name for name in reasons if name in ("1.0:conv2d", "1.0:linear"))
    assert reasons.pop(layer).endswith("is computed, not stored")
    assert all("only computes with parameters" in why for why in reasons.values() if why)
    prepared = compiled.prepare()
    before = {name: p.detach().clone() for name, p in prepared.named_parameters()}
    losses = train(prepared, [batch] * 3, rate=1e-3)
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[name]) for name, p in prepared.named_parameters())
    assert torch.isfinite(compiled.convert(prepared)(batch)).all()


def test_what_does_not_learn_is_constant_in_training_as_well():
    model, batch = made("joined")
    model.requires_grad_(False)
    compiled = qrecipe.compile(model, qat_recipe(), batch)
    assert sites(compiled.plan)["0:linear"].verdict == "quantized"


def test_the_callers_tensors_are_neither_written_to_nor_returned():
    def forward(self, x):
        scale = self.scale.exp()
        return x * scale.clone().mul_(2), scale, F.linear(x, scale.expand(8, 8))

    model = net_of(forward)
    model.scale = nn.Parameter(torch.zeros(8))
    converted = qrecipe.quantize(model, recipe(), [ROWS] * 3, progress=silent)
    for _ in range(2):
        product, scale, _ = converted(ROWS)
        assert torch.equal(scale, torch.ones(8))
        assert output_sqnr_db(ROWS * 2, product) > 25
        scale.mul_(3)
    assert torch.equal(model.scale, torch.zeros(8))


def test_a_rule_for_a_call_that_is_gone_says_so():
    model, batch = made("joined")
    with pytest.raises(UnmatchedRuleError, match=r"0:cat, which .* only computes with stored"):
        qrecipe.plan(model, recipe('[rules.module_name]\n"0:cat" = "float"'), batch)
