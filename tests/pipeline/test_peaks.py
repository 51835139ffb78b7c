"""No step holds a second copy of the float weights: `benchmarks/memory.py` has the figures."""

from __future__ import annotations

import os

import pytest
from peaks import FORGET_PEAK, WAYS, peaks_in_a_process

pytestmark = pytest.mark.skipif(
    not os.access(FORGET_PEAK, os.W_OK), reason="the peak of memory is read as Linux tells it"
)

GOALS = {"quantize": 1.0, "save": 0.3, "load": 0.5}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return peaks_in_a_process(tmp_path_factory.mktemp("peaks"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", GOALS)
def test_quantizing_saving_and_loading_copy_no_float_weights(way, step, found):
    assert 0 < found[way][step] <= GOALS[step]
