"""What training mode adds to a model: what drops, branches and noise."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from artifacts import MODES
from plans import net_of, sites
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from training import db, fake_quants, qat_recipe, trained

import qrecipe
from qrecipe.errors.findings import PlanError


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, self.training))


def test_a_dropout_function_drops_in_training_mode_and_not_in_eval_mode():
    batch = torch.randn(8, 6)
    compiled = qrecipe.compile(Dropping().eval(), qat_recipe(), batch)
    prepared = compiled.prepare()
    assert not torch.equal(prepared(batch), prepared(batch))
    prepared.eval()
    assert torch.equal(prepared(batch), prepared(batch))
    converted = compiled.convert(prepared)
    assert torch.equal(converted(batch), converted(batch))
    assert db(prepared, converted, batch) > 25


def test_what_drops_may_have_another_reader_before():
    model = net_of(
        lambda self, x: self.base(x) + self.up(self.down(self.drop(x))),
        base=nn.Linear(6, 6),
        down=nn.Linear(6, 2, bias=False),
        up=nn.Linear(2, 6, bias=False),
        drop=nn.Dropout(0.5),
    )
    batch = torch.randn(8, 6)
    compiled, prepared = trained(model, [batch], qat_recipe())
    assert not torch.equal(prepared(batch), prepared(batch))
    converted = compiled.convert(prepared.eval())
    assert db(prepared, converted, batch) > 25


def test_a_layer_that_rounds_its_input_itself_may_read_what_drops():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    rules = f'{MODES}[rules.module_name]\n"2" = "dynamic"\n'
    batch = torch.randn(8, 6)
    compiled, prepared = trained(model, [batch], qat_recipe(rules=rules))
    assert compiled.plan["2"].mode == "dynamic"
    converted = compiled.convert(prepared.eval())
    assert db(prepared, converted, batch) > 25


def test_a_layer_whose_weight_a_hook_computes_is_trained_beside_others():
    layer = l1_unstructured(nn.Linear(6, 6), "weight", 0.5)
    batch = torch.randn(8, 6)
    model = nn.Sequential(layer, nn.Linear(6, 3)).eval()
    compiled, prepared = trained(model, [batch] * 2, qat_recipe())
    converted = compiled.convert(prepared.eval())
    assert not torch.equal(prepared.get_submodule("0").weight_orig, layer.weight_orig)
    assert db(prepared, converted, batch) > 25


@torch.no_grad()
def features(self, x):
    return self.body(x)


@pytest.mark.parametrize(
    ("take", "is_said"),
    [
        (features, True),
        (lambda self, x: torch.inference_mode()(self.body)(x).clone(), True),
        (torch.no_grad()(lambda self, x: F.linear(x, self.body.weight.abs())), True),
        (torch.no_grad()(lambda self, x: x * 2), False),
        (lambda self, x: self.body(x).detach(), False),
    ],
    ids=["no_grad", "inference_mode", "weight", "input", "detach"],
)
@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
def test_what_learns_although_forward_computes_without_gradients_is_warned_about(take, is_said):
    model = net_of(
        lambda self, x: self.head(take(self, x)), body=nn.Linear(6, 6), head=nn.Linear(6, 3)
    )
    batch = torch.randn(4, 6)
    codes = [w.message for w in qrecipe.plan(model, qat_recipe(), batch).warnings]
    assert any("gradients that they do not get" in each for each in codes) is is_said
    model.body.requires_grad_(False)
    codes = [w.code for w in qrecipe.plan(model, qat_recipe(), batch).warnings]
    assert "QR205" not in codes


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6))
        self.inner = net_of(
            lambda self, x: self.fc(x) * 2 if self.training else self.fc(x), fc=nn.Linear(6, 3)
        )

    def forward(self, x):
        return self.inner(self.body(x))


def test_outputs_that_only_training_gives_are_warned_about():
    model = net_of(
        lambda self, x: (self.fc(x), x) if self.training else self.fc(x), fc=nn.Linear(6, 6)
    )
    with pytest.warns(qrecipe.QRecipeWarning, match="QR205"):
        plan = qrecipe.plan(model, qat_recipe(), torch.randn(4, 6))
    (warning,) = [w for w in plan.warnings if w.code == "QR205"]
    assert warning.message.startswith("the model's own forward behaves differently in training")


def test_a_forward_that_branches_on_training_is_warned_about_with_its_name():
    model, batch = Auxiliary().eval(), torch.randn(4, 6)
    with pytest.warns(qrecipe.QRecipeWarning, match="QR205"):
        plan = qrecipe.plan(model, qat_recipe(), batch)
    assert [w.message for w in plan.warnings if w.code == "QR205"] == [
        "the forward of inner behaves differently in training mode; only its eval branch is trained"
    ]
    ptq = qrecipe.plan(model, "builtin:x86-static", batch)
    assert "QR205" not in {w.code for w in ptq.warnings}
    dropping = qrecipe.plan(Dropping().eval(), qat_recipe(), batch)
    assert "QR205" not in {w.code for w in dropping.warnings}


def test_a_transposed_convolution_and_its_batch_norm_stay_apart_in_training():
    model = net_of(
        lambda self, x: self.bn(self.up(self.conv(x))),
        conv=nn.Conv2d(3, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 2),
        bn=nn.BatchNorm2d(4),
    )
    batches = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    ptq = sites(qrecipe.plan(model, "builtin:x86-static", batches[0]))
    assert ptq["up"].op == "ConvTranspose2d+BatchNorm2d"
    compiled, prepared = trained(model, batches, qat_recipe())
    assert [s.op for s in compiled.plan.sites] == ["Conv2d", "ConvTranspose2d", "BatchNorm2d"]
    assert db(prepared.eval(), compiled.convert(prepared), batches[0]) > 25


def test_what_torch_cannot_fuse_is_an_error_of_ours(monkeypatch):
    def fail(*args):
        raise NotImplementedError("no such fusion")

    monkeypatch.setattr("qrecipe.model.graph_sites.fuse", fail)
    with pytest.raises(PlanError, match="torch cannot fuse the model: no such fusion"):
        qrecipe.plan(nn.Sequential(nn.Linear(4, 4)).eval(), qat_recipe(), torch.randn(2, 4))


@pytest.mark.parametrize("phase", ["ptq", "qat"])
def test_a_preparation_in_which_torch_fails_is_an_error_of_the_plan(phase, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no such observer")

    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static"\nphase = "{phase}"\n'
    )
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    compiled = qrecipe.compile(model, recipe, torch.randn(2, 4))
    monkeypatch.setattr("qrecipe.execution.fx.convert.prepare", fail)
    with pytest.raises(PlanError, match="torch cannot prepare the model: no such observer"):
        compiled.prepare()


def test_parts_of_a_model_are_trained_in_place():
    model = net_of(
        lambda self, x: self.head(self.body(x)) if x.sum() > -1e9 else x,
        body=nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        head=nn.Linear(6, 3),
    )
    recipe = qat_recipe(rules='[fx]\nroots = ["body"]\n')
    batches = [torch.randn(4, 6) for _ in range(3)]
    compiled, prepared = trained(model, batches, recipe)
    assert prepared.training
    assert not torch.equal(prepared.head.weight, model.head.weight)
    converted = compiled.convert(prepared)
    assert ".quantized." in type(converted.body.get_submodule("0")).__module__
    assert db(prepared.eval(), converted, batches[0]) > 25


def test_only_dropout_that_follows_training_drops():
    never = net_of(
        lambda self, x: self.b(F.dropout(self.a(x), 0.5, training=False)),
        a=nn.Linear(6, 64),
        b=nn.Linear(64, 3),
    )
    follows = net_of(
        lambda self, x: self.b(torch.dropout(self.a(x), 0.5, self.training)),
        a=nn.Linear(6, 64),
        b=nn.Linear(64, 3),
    )
    batch = torch.randn(8, 6)
    for model, drops in ((never, False), (follows, True)):
        prepared = qrecipe.compile(model, qat_recipe(), batch).prepare()
        prepared(batch)
        for module in fake_quants(prepared).values():
            module.disable_observer()
        assert (not torch.equal(prepared(batch), prepared(batch))) is drops


class Noisy(nn.Linear):
    """Adds noise while training."""

    def forward(self, x):
        x = super().forward(x)
        return x + torch.randn(6) if self.training else x


def test_noise_that_a_trained_graph_lacks_is_warned_about():
    model = nn.Sequential(nn.Linear(6, 6), Noisy(6, 6), nn.Linear(6, 2)).train()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        qrecipe.compile(model, qat_recipe(), torch.randn(4, 6))
    ours = [each for each in found if issubclass(each.category, qrecipe.QRecipeWarning)]
    assert [str(each.message)[:5] for each in ours] == ["QR205"]  # training mode is as it should be
    assert "the forward of 1" in str(ours[0].message)
