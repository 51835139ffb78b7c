"""An observer of a plugin that fails after its registration is named, and nothing else blamed."""

from __future__ import annotations

import pytest
import torch
from nets import Mlp
from runs import STATIC, silent
from torch.ao.quantization import FakeQuantize, MinMaxObserver

import qrecipe
from qrecipe.errors.findings import CalibrationError
from qrecipe.registry import table as registered

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LARGE = 100 * torch.ones(4, 6)
"""No tensor of the contract is as large, so that registration cannot know what follows."""


class Failing(MinMaxObserver):
    def forward(self, x):
        if x.max() > 50:
            raise RuntimeError("too large")
        return super().forward(x)


class FailingWhenFrozen(FakeQuantize):
    def forward(self, x):
        if not self.observer_enabled[0] and not self.training:
            raise RuntimeError("not frozen yet")
        return super().forward(x)


class Narrow(MinMaxObserver):
    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return scale * 1e-20, zero_point


@pytest.fixture(autouse=True)
def plugins():
    qrecipe.register_observer("failing")(Failing)
    qrecipe.register_observer("narrow")(Narrow)
    qrecipe.register_fake_quant("failing_when_frozen")(FailingWhenFrozen)
    yield
    registered.remove("observer", "failing")
    registered.remove("observer", "narrow")
    registered.remove("fake_quant", "failing_when_frozen")


def of(tensor, text, head=""):
    return qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static"\n{head}\n[tensor.{tensor}]\n{text}\n'
    )


def refusal(function):
    with pytest.raises(CalibrationError) as caught:
        function()
    return caught.value.findings


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_an_observer_that_fails_in_calibration_is_to_blame_and_not_the_batch(executor):
    failing = of("activation", 'observer = "failing"')
    compiled = qrecipe.compile(Mlp().eval(), failing, INPUTS, executor=executor)
    (finding,) = refusal(
        lambda: qrecipe.calibrate(compiled.prepare(), [INPUTS, LARGE], progress=silent)
    )
    assert finding.code == "QR404"
    assert "(Failing) fails in forward: RuntimeError: too large" in finding.message
    assert "the observer of the input of " in finding.message
    assert finding.notes[0].startswith(f"raised at {__file__}:")


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
@pytest.mark.parametrize("run", [qrecipe.quantize, qrecipe.sensitivity])
def test_an_observer_that_fails_on_a_weight_is_to_blame_and_not_torch(executor, run):
    text = 'observer = "failing"\nqscheme = "per_tensor_symmetric"'
    failing = of("weight", text, f'executor = "{executor}"')
    model = Mlp().eval()
    with torch.no_grad():
        next(model.parameters()).fill_(100)
    (finding,) = refusal(lambda: run(model, failing, [INPUTS] * 10, progress=silent))
    assert finding.code == "QR404"
    assert "the observer (Failing) fails in forward: RuntimeError: too large" in finding.message


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_a_fake_quant_that_fails_in_conversion_is_named(executor):
    failing = of("activation", 'fake_quant = "failing_when_frozen"', 'phase = "qat"')
    compiled = qrecipe.compile(Mlp(), failing, INPUTS, executor=executor)
    prepared = compiled.prepare()
    prepared(INPUTS)
    (finding,) = refusal(lambda: compiled.convert(prepared))
    assert "the fake-quant of the input of " in finding.message
    assert "(FailingWhenFrozen) fails in forward: RuntimeError" in finding.message


def test_a_range_so_narrow_that_kernels_overflow_is_the_observers_fault():
    narrow = of("activation", 'observer = "narrow"')
    found = refusal(lambda: qrecipe.quantize(Mlp().eval(), narrow, [INPUTS] * 10, progress=silent))
    assert {finding.code for finding in found} == {"QR404"}
    assert '("narrow") gives a range that is far too narrow' in found[0].message


def test_a_batch_that_an_observer_of_torch_cannot_take_is_still_to_blame():
    compiled = qrecipe.compile(Mlp().eval(), STATIC, INPUTS)
    (finding,) = refusal(
        lambda: qrecipe.calibrate(compiled.prepare(), [INPUTS, INPUTS[:, :5]], progress=silent)
    )
    assert finding.code == "QR402"
