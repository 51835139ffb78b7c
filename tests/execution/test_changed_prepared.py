"""A prepared model that was changed before its conversion gets our own error."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training import qat_recipe

import qrecipe
from qrecipe.errors.findings import CalibrationError, ExecutionError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))


@pytest.fixture(params=["fx", "pt2e"])
def compiled(request):
    return qrecipe.compile(Normed(), qat_recipe(), IMAGES, executor=request.param)


@pytest.fixture
def prepared(compiled):
    made = compiled.prepare()
    made(IMAGES)
    return made


def refused(kind, compiled, prepared):
    with pytest.raises(kind) as caught:
        compiled.convert(prepared)
    return caught.value.findings[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_is_converted_as_the_advice_says(compiled, prepared, dtype):
    finding = refused(CalibrationError, compiled, prepared.to(dtype))
    assert finding.code == "QR406"
    assert str(dtype).removeprefix("torch.") in finding.message
    assert 'prepared.to("cpu", torch.float32)' in finding.hint
    compiled.convert(prepared.to("cpu", torch.float32))


def test_a_model_without_values_is_said_to_be_moved(compiled, prepared):
    assert "on meta" in refused(CalibrationError, compiled, prepared.to("meta")).message


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_training_that_diverged_is_named_by_its_weights(compiled, prepared, name):
    state = prepared.state_dict()
    with torch.no_grad():
        next(tensor for key, tensor in state.items() if key.endswith(name)).fill_(torch.nan)
    finding = refused(CalibrationError, compiled, prepared)
    assert finding.code == "QR404"
    assert "training has put NaN or infinity in " in finding.message
    assert name in finding.message


def test_a_model_that_lost_a_weight_cannot_be_run(compiled, prepared):
    path, _, name = next(iter(dict(prepared.named_parameters()))).rpartition(".")
    setattr(prepared.get_submodule(path), name, None)
    finding = refused(ExecutionError, compiled, prepared)
    assert finding.code == "QR405"
    assert "compiled.prepare()" in finding.hint


def test_a_pickled_model_of_fx_is_refused_and_its_state_is_not():
    compiled = qrecipe.compile(Normed(), qat_recipe(), IMAGES, executor="fx")
    prepared = compiled.prepare()
    prepared(IMAGES)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    finding = refused(CalibrationError, compiled, torch.load(file, weights_only=False))
    assert finding.code == "QR406"
    assert "was pickled" in finding.message
    again = compiled.prepare()
    again.load_state_dict(prepared.state_dict())
    compiled.convert(again)


def test_averaged_weights_are_converted_if_they_began_after_calibration(compiled):
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, [IMAGES] * 10, progress=False)
    averaged = AveragedModel(prepared, use_buffers=True)
    prepared(IMAGES)
    averaged.update_parameters(prepared)
    converted = compiled.convert(averaged.module)
    assert torch.isfinite(converted(IMAGES)).all()
