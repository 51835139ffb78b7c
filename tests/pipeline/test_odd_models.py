"""Models that are unusual without being wrong, and what must not happen to them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from runs import silent
from torch import nn

import qrecipe
from qrecipe._torch_ao import MinMaxObserver
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import (
    CalibrationError,
    PlanError,
    UnmatchedRuleError,
    UnsupportedError,
)

STATIC = "builtin:x86-static"


def rows(count=12, width=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, width, generator=generator) for _ in range(count)]


def masked(self, x, mask=None, scale=1.0):
    y = self.fc(x)
    if mask is not None:
        y = y * mask
    return y * scale


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    forward = masked


def test_an_optional_argument_that_is_not_given_is_a_constant_of_the_graph():
    model = Masked().eval()
    converted = qrecipe.quantize(model, STATIC, rows(), progress=silent)
    x = rows(1)[0]
    assert sqnr_db(model(x), converted(x)) > 25
    assert sqnr_db(model(x), converted(x, scale=1.0)) > 25
    with pytest.raises(Exception, match="mask"):
        converted(x, torch.ones(8, 6))


def test_an_optional_argument_that_is_given_is_an_input_of_the_graph():
    model = Masked().eval()
    batches = [{"x": x, "mask": torch.ones(8, 6) * 0.5} for x in rows()]
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    mask = torch.ones(8, 6) * 0.25
    assert sqnr_db(model(batches[0]["x"], mask), converted(batches[0]["x"], mask)) > 25


class InPlaceResidual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.a, self.activation, self.b = nn.Linear(6, 6), activation, nn.Linear(6, 6)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.activation(x) + x)


@pytest.mark.parametrize("activation", [nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ELU])
def test_an_activation_in_place_whose_input_is_read_again_is_quantized_right(activation):
    torch.manual_seed(0)
    model = InPlaceResidual(activation(inplace=True)).eval()
    converted = qrecipe.quantize(model, STATIC, rows(), progress=silent)
    x = rows(1)[0]
    assert sqnr_db(model(x.clone()), converted(x.clone())) > 20


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return F.linear(self.fc(x), self.fc.weight) + self.fc.weight.sum()


def test_a_weight_that_a_module_and_a_function_share_is_quantized_in_both():
    torch.manual_seed(0)
    model = Tied().eval()
    plan = qrecipe.plan(model, STATIC, rows(1)[0])
    assert [site.verdict for site in plan.sites[:2]] == ["quantized", "quantized"]
    converted = qrecipe.quantize(model, STATIC, rows(), progress=silent)
    assert sqnr_db(model(rows(1)[0]), converted(rows(1)[0])) > 20


def test_every_module_of_a_converted_model_is_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).eval()
    converted = qrecipe.quantize(model, STATIC, rows(), progress=silent)
    assert not any(module.training for module in converted.modules())


def test_a_converted_model_that_nobody_holds_is_freed():
    model, batches = nn.Sequential(nn.Linear(6, 6)).eval(), rows()
    compiled = qrecipe.compile(model, STATIC, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    converted = compiled.convert(prepared)
    kept = [weakref.ref(prepared), weakref.ref(converted)]
    del prepared, converted
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5, True)


def test_a_forward_that_draws_random_numbers_is_refused_and_not_blamed_on_a_kernel():
    with pytest.raises(PlanError, match="random"):
        qrecipe.quantize(Drawing().eval(), STATIC, rows(), progress=silent)


def test_the_callers_random_state_is_not_moved():
    model, batches = nn.Sequential(nn.Linear(6, 6)).eval(), rows()
    before = torch.get_rng_state()
    qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert torch.equal(before, torch.get_rng_state())


def test_a_lazy_model_stays_lazy_and_is_told_to_run_once():
    model = nn.Sequential(nn.LazyLinear(5)).eval()
    with pytest.raises(PlanError, match="lazy"):
        qrecipe.plan(model, STATIC, rows(1)[0])
    assert isinstance(model[0].weight, nn.UninitializedParameter)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_model_is_refused():
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(6, 6)).eval(), rows(1)[0])
    with pytest.raises(PlanError, match="TorchScript"):
        qrecipe.quantize(scripted, STATIC, rows(), progress=silent)


def test_a_sparse_batch_is_our_error():
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    with pytest.raises((PlanError, CalibrationError)):
        qrecipe.quantize(model, STATIC, [rows(1)[0].to_sparse()] * 10, progress=silent)


def test_a_stored_sparse_matrix_is_read_as_any_other():
    model = net_of(
        lambda self, x: self.fc(torch.sparse.mm(self.graph, self.fc(x))), fc=nn.Linear(6, 6)
    )
    model.register_buffer("graph", torch.eye(4).to_sparse())
    model = model.eval()
    batches = [torch.randn(4, 6) for _ in range(10)]
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    with torch.no_grad():
        assert sqnr_db(model(batches[0]), converted(batches[0])) > 20
    summed = net_of(lambda self, x: self.fc(x) + self.graph, fc=nn.Linear(6, 4))
    summed.register_buffer("graph", torch.eye(4).to_sparse())
    assert "QR237" not in {
        each.code for each in qrecipe.plan(summed.eval(), STATIC, batches[0]).warnings
    }


@pytest.mark.parametrize("name", ["nope", "forward", "__class__", "_modules"])
def test_only_attributes_of_the_models_own_can_be_preserved(name):
    text = f'format = 1\nextends = "{STATIC}"\n[fx]\npreserved_attributes = ["{name}"]'
    with pytest.raises(UnmatchedRuleError) as caught:
        qrecipe.plan(nn.Sequential(nn.Linear(6, 6)).eval(), qrecipe.parse_recipe(text), rows(1)[0])
    assert caught.value.findings[0].location.line == 4


class Computing(nn.Linear):
    KINDS = ("a", "b")

    @property
    def norm(self):
        raise AssertionError("the property was run")

    def half(self, x):
        return self(x) / 2


@pytest.mark.parametrize("name", ["norm", "half"])
def test_properties_and_methods_cannot_be_preserved_and_are_not_run(name):
    text = f'format = 1\nextends = "{STATIC}"\n[fx]\npreserved_attributes = ["KINDS", "{name}"]'
    model = Computing(6, 6).eval()
    with pytest.raises(UnmatchedRuleError) as caught:
        qrecipe.plan(model, qrecipe.parse_recipe(text), rows(1)[0])
    (finding,) = caught.value.findings
    assert f'"{name}"' in finding.message
    assert "float model" in finding.hint


def test_findings_about_roots_point_into_the_recipe():
    text = f'format = 1\nextends = "{STATIC}"\n[fx]\nroots = ["nope"]'
    with pytest.raises(UnmatchedRuleError) as caught:
        qrecipe.plan(nn.Sequential(nn.Linear(6, 6)).eval(), qrecipe.parse_recipe(text), rows(1)[0])
    assert caught.value.findings[0].location.line == 4


def test_a_model_that_fails_in_the_audit_prints_nothing(capfd, monkeypatch):
    monkeypatch.setattr("qrecipe.planning.backend.refusal", lambda *args: None)
    conv = nn.Conv2d(3, 4, 1)
    model = net_of(lambda self, x: F.interpolate(self.c(x), scale_factor=2, mode="bicubic"), c=conv)
    with pytest.raises(qrecipe.QRecipeError, match="QR413"):
        qrecipe.quantize(model, STATIC, [torch.randn(2, 3, 4, 4)] * 10, progress=silent)
    assert capfd.readouterr().err == ""


@pytest.fixture
def registered():
    from qrecipe.registry import table

    names = []

    def register(name, **members):
        cls = type(name.title(), (MinMaxObserver,), members)
        qrecipe.register_observer(name)(cls)
        names.append(name)
        return qrecipe.parse_recipe(
            f'format = 1\nextends = "{STATIC}"\n[tensor.activation]\nobserver = "{name}"'
        )

    yield register
    for name in names:
        table.remove("observer", name)


def test_an_observer_that_gives_a_bad_scale_on_real_data_is_blamed_itself(registered):
    def calculate(self):
        bad = self.max_val > 3.5  # fine on the samples of the contract
        scale = torch.tensor([float("nan") if bad else 0.1])
        return scale, torch.tensor([0])

    recipe = registered("nanny", calculate_qparams=calculate)
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    with pytest.raises(CalibrationError, match="scale"):
        qrecipe.quantize(model, recipe, [x * 100 for x in rows()], progress=silent)


def test_an_observer_that_refuses_its_settings_is_found_when_planning(registered):
    recipe = registered("plain")
    text = recipe.to_toml().replace('observer = "per_channel_minmax"', 'observer = "plain"')
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(model, qrecipe.parse_recipe(text), rows(1)[0])
    assert caught.value.findings[0].code == "QR311"
