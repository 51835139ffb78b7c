"""Opened layers through the whole pipeline: traced and module by module, stored, trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from corpus import missing, torchvision
from plans import net_of, recipe, sites, verdicts
from runs import silent
from shares import every
from torch import nn
from training import qat_recipe, trained

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db

E = 16
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
DYNAMIC = "builtin:x86-dynamic"


class Classifier(nn.Module):
    """Encodes sentences; ``branches`` is code that no trace follows."""

    def __init__(self, branches=False):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            layer = nn.TransformerEncoderLayer(E, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
        self.head, self.branches = nn.Linear(E, 3), branches

    def forward(self, x, padded):
        if self.branches and x.sum() > 1e9:
            return x
        return self.head(self.encoder(x, src_key_padding_mask=padded))


BATCHES = [(torch.randn(2, 5, E), PADDED) for _ in range(10)]
LINEAR = {
    *(f"encoder.layers.0.self_attn.{each}_proj" for each in ("q", "k", "v", "out")),
    *("encoder.layers.0.linear1", "encoder.layers.0.linear2", "head"),
}
WAYS = {"static": (False, recipe()), "dynamic": (False, DYNAMIC), "by module": (True, DYNAMIC)}


@pytest.mark.filterwarnings("ignore:.*QR210", "ignore:.*nested tensors")
@pytest.mark.parametrize("way", WAYS)
def test_an_encoder_is_quantized_whole_stored_and_compared(way, tmp_path):
    branches, a_recipe = WAYS[way]
    model = Classifier(branches).eval()
    converted = qrecipe.quantize(model, a_recipe, BATCHES, progress=silent)
    plan = planned(converted)
    assert plan.executor == ("eager" if branches else "fx")
    assert {site.name for site in plan if site.op.startswith("Linear")} == LINEAR
    assert all(sites(plan)[name].verdict == "quantized" for name in LINEAR)
    qrecipe.save_quantized(converted, tmp_path / "q.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "q.safetensors", Classifier(branches))
    with torch.no_grad():
        for batch in (BATCHES[0], (BATCHES[0][0][:1, :4], PADDED[:1, :4])):
            assert output_sqnr_db(model(*batch), converted(*batch)) > 20
            assert torch.equal(converted(*batch), loaded(*batch))
    compared = qrecipe.compare(model, converted, BATCHES, progress=silent)
    assert {site.name for site in compared.sites if site.weight} >= LINEAR


def test_training_drops_in_an_opened_layer_and_reaches_every_weight():
    model = net_of(
        lambda self, x: self.fc(self.attend(x, x, x, need_weights=False)[0]),
        attend=nn.MultiheadAttention(E, 2, dropout=0.5, batch_first=True),
        fc=nn.Linear(E, 2),
    )
    batches = [x for x, _ in BATCHES]
    compiled, prepared = trained(model, batches, qat_recipe())
    assert not torch.equal(prepared(batches[0]), prepared(batches[0]))
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    prepared.eval()
    converted = compiled.convert(prepared)
    assert output_sqnr_db(prepared(batches[0]), converted(batches[0])) > 20


def test_an_opened_model_can_be_ranked():
    ranking = qrecipe.sensitivity(Classifier().eval(), recipe(), BATCHES, progress=silent)
    assert {site.name for site in ranking.sites} >= LINEAR


# --- products with a stored matrix


class Multiplied(nn.Module):
    """As transformers' Conv1D is written."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = matrix(), nn.Parameter(torch.randn(8))

    def forward(self, x):
        size = x.size()[:-1] + (8,)  # noqa: RUF005
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def matrix(rows=E, columns=8):
    return nn.Parameter(torch.randn(rows, columns) / 4)


def vector():
    return nn.Parameter(torch.randn(8))


PRODUCTS = {
    "x @ w": (lambda self, x: x @ self.w, {"w": matrix()}),
    "matmul": (lambda self, x: torch.matmul(x, self.w), {"w": matrix()}),
    "x @ w.t()": (lambda self, x: x @ self.w.t(), {"w": matrix(8, E)}),
    "x @ w.T + b": (lambda self, x: x @ self.w.T + self.b, {"w": matrix(8, E), "b": vector()}),
    "b + x @ w": (lambda self, x: self.b + x @ self.w, {"w": matrix(), "b": vector()}),
    "x.matmul(w)": (
        lambda self, x: x.matmul(self.w.transpose(-1, -2)).add(self.b),
        {"w": matrix(8, E), "b": vector()},
    ),
    "mm": (lambda self, x: x.flatten(0, 1).mm(self.w), {"w": matrix()}),
    "addmm": (
        lambda self, x: torch.addmm(self.b, x.flatten(0, 1), self.w),
        {"w": matrix(), "b": vector()},
    ),
    "tied": (lambda self, x: x @ self.table.weight.t(), {"table": nn.Embedding(8, E)}),
}
WORDS = [torch.randn(3, 5, E) for _ in range(10)]


def product_net(case):
    forward, stored = PRODUCTS[case]
    return net_of(forward, **stored)


@pytest.mark.parametrize("a_recipe", every(2, [recipe(), DYNAMIC]), ids=["static", "dynamic"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_with_a_stored_matrix_is_a_linear_layer(case, a_recipe):
    model = product_net(case)
    converted = qrecipe.quantize(model, a_recipe, WORDS, progress=silent)
    (site,) = (site for site in planned(converted) if site.verdict == "quantized")
    assert site.name.startswith(":")
    assert site.qconfig.weight.qscheme == "per_channel_symmetric"
    assert output_sqnr_db(model(WORDS[0]), converted(WORDS[0])) > 25


@pytest.mark.parametrize("a_recipe", [recipe(), DYNAMIC], ids=["static", "dynamic"])
def test_a_product_of_a_product_is_two_linear_layers(a_recipe):
    def forward(self, x):
        return self.linear(x) + x @ self.down @ self.up.T

    model = net_of(forward, linear=nn.Linear(E, 8), down=matrix(E, 4), up=matrix(8, 4))
    converted = qrecipe.quantize(model, a_recipe, WORDS, progress=silent)
    assert {":matmul", ":matmul#1"} <= {
        site.name for site in planned(converted) if site.verdict == "quantized"
    }
    assert output_sqnr_db(model(WORDS[0]), converted(WORDS[0])) > 25


LEFT = {
    "the matrix is on the left": lambda self, x: self.w @ x.transpose(1, 2),
    "it is computed": lambda self, x: x @ (x.mean() * self.w).t(),
    "scaled": lambda self, x: torch.addmm(self.b, x.flatten(0, 1), self.w.t(), alpha=2),
}


@pytest.mark.parametrize("case", LEFT)
def test_another_product_is_none(case):
    model = net_of(LEFT[case], w=matrix(8, E), b=nn.Parameter(torch.randn(8)))
    converted = qrecipe.quantize(model, DYNAMIC, WORDS[:1], progress=silent)
    assert torch.equal(converted(WORDS[0]), model(WORDS[0]))


def test_rules_for_products_and_for_linear_layers_both_cover_it():
    model = product_net("x @ w.T + b")
    for function in ("torch.matmul", "torch.nn.functional.linear"):
        left = recipe(f'[rules.function]\n"{function}" = "float"')
        assert sites(qrecipe.plan(model, left, WORDS[0]))[":matmul"].verdict == "float"


@pytest.mark.filterwarnings("ignore:.*QR210")
@pytest.mark.parametrize("branches", [False, True], ids=["traced", "by module"])
def test_a_layer_that_only_multiplies_is_a_linear_one_by_its_own_name(branches, tmp_path):
    def forward(self, x):
        return x if branches and x.sum() > 1e9 else self.last(torch.relu(self.first(x)))

    def make():
        return net_of(forward, first=Multiplied(), last=nn.Linear(8, 2))

    model = make()
    own = f"{Multiplied.__module__}.{Multiplied.__qualname__}"
    left = recipe(f'[rules.module_type]\n"{own}" = "float"', base=DYNAMIC)
    assert sites(qrecipe.plan(model, left, WORDS[0]))["first"].verdict == "float"
    converted = qrecipe.quantize(model, DYNAMIC, WORDS[:1], progress=silent)
    assert verdicts(planned(converted))["first"] == "quantized"
    qrecipe.save_quantized(converted, tmp_path / "q.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "q.safetensors", make())
    assert torch.equal(loaded(WORDS[0]), converted(WORDS[0]))
    assert output_sqnr_db(model(WORDS[0]), converted(WORDS[0])) > 25


def planned(converted):
    return qrecipe.Plan.from_json(qrecipe.provenance(converted).plan)


# --- torchvision's attention in windows


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("name", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize("size", [(8, 8), (10, 7), (4, 12), (3, 9)])
def test_attention_in_windows_computes_the_same(name, size):
    swin = torchvision("models.swin_transformer")
    for shift in (0, 2):
        layer = getattr(swin, name)(12, [4, 4], [shift, shift], 3).eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        model = nn.Sequential(nn.Linear(12, 12), layer).eval()
        found = sites(qrecipe.plan(model, recipe(), torch.randn(2, *size, 12)))
        assert found["1.qkv"].verdict == found["1.proj"].verdict == "quantized"
        assert found["1.windows"].reason == "moves the integers of 0"
        assert found["1.merged"].reason == "moves the integers of 1.proj"


MASKED = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)


def own_attention(self, x, mask):
    scores = self.q(x) @ self.k(x).transpose(-2, -1) + mask
    return self.out(scores.softmax(-1) @ self.v(x))


INFINITE = {
    "opened": net_of(
        lambda self, x, mask: self.attn(x, x, x, attn_mask=mask)[0],
        attn=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "written": net_of(own_attention, **{name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}),
    "made inside": net_of(
        lambda self, x, mask: own_attention(self, x, torch.zeros_like(mask) + mask),
        **{name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")},
    ),
}


@pytest.mark.parametrize("case", INFINITE)
def test_a_mask_of_infinities_may_be_an_input(case, tmp_path):
    model, batch = INFINITE[case], (torch.rand(2, 5, 8), MASKED)
    plan = qrecipe.plan(model, recipe(), batch)
    assert {site.verdict for site in plan if site.op == "Linear"} == {"quantized"}
    if case == "written":
        assert plan[":add"].reason == "mask has infinite values, which have no range"
    converted = qrecipe.quantize(model, recipe(), [batch] * 10)
    assert output_sqnr_db(model(*batch), converted(*batch)) > 25
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(*batch), converted(*batch))
