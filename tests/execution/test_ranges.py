"""Observers of the user's own that give unusable qparams on real data (QR404)."""

from __future__ import annotations

import pytest
import torch
from failures import rows
from nets import Mlp
from plans import recipe
from runs import silent
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.errors.findings import CalibrationError
from qrecipe.registry import table as registered

OWN = """
[tensor.own]
observer = "own"
dtype = "uint8"
qscheme = "per_tensor_affine"
[qconfig.own]
weight = "weight"
activation = "own"
[rules]
global = "own"
"""

SEEN = 50.0
"""No batch of the contract reaches this, so that registration cannot know what follows."""


@pytest.fixture
def calibrated():
    """Calibrate with an observer whose qparams ``spoil`` changes once it has seen large values."""

    def run(spoil):
        class Own(MinMaxObserver):
            def calculate_qparams(self):
                scale, zero_point = super().calculate_qparams()
                if self.max_val < SEEN:
                    return scale, zero_point
                return spoil(scale, zero_point)

        qrecipe.register_observer("own")(Own)
        compiled = qrecipe.compile(Mlp().eval(), recipe(OWN), torch.zeros(2, 6), target_cpu="vnni")
        batches = [*rows(), 100 * torch.ones(4, 6)]
        qrecipe.calibrate(compiled.prepare(), batches, progress=silent)

    yield run
    registered.remove("observer", "own")


def explode(scale, zero_point):
    raise RuntimeError("too large")


SPOILT = {
    "zero": (lambda s, z: (s * 0, z), "a scale that is not finite and positive"),
    "negative": (lambda s, z: (-s, z), "a scale that is not finite and positive"),
    "infinite": (lambda s, z: (s / 0, z), "a scale that is not finite and positive"),
    "not_a_number": (lambda s, z: (s * torch.nan, z), "a scale that is not finite and positive"),
    "below": (lambda s, z: (s, torch.full_like(z, -1)), "a zero point outside 0..255"),
    "above": (lambda s, z: (s, torch.full_like(z, 256)), "a zero point outside 0..255"),
    "none": (explode, "no qparams: too large"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_an_observer_without_usable_qparams_is_named_with_its_site(calibrated, kind):
    spoil, problem = SPOILT[kind]
    with pytest.raises(CalibrationError) as caught:
        calibrated(spoil)
    first = caught.value.findings[0]
    assert {finding.code for finding in caught.value.findings} == {"QR404"}
    assert first.message == f"the observer of the input of fc1 (Own) gives {problem}"
    assert first.hint


def test_qparams_at_the_edges_are_usable(calibrated):
    calibrated(lambda s, z: (s.clamp(max=1e-30), torch.zeros_like(z)))
    registered.remove("observer", "own")
    calibrated(lambda s, z: (s, torch.full_like(z, 255)))
