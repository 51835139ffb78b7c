"""No step holds a second copy of the float weights: `benchmarks/memory.py` has the figures."""

from __future__ import annotations

import os

import pytest
from peaks import FORGET_PEAK, WAYS, peaks_in_a_process
from shares import every

pytestmark = pytest.mark.skipif(
    not os.access(FORGET_PEAK, os.W_OK), reason="the peak of memory is read as Linux tells it"
)

GOALS = {"quantize": 1.0, "save": 0.3, "load": 0.5}


@pytest.mark.parametrize("way", every(len(WAYS), WAYS))
def test_quantizing_saving_and_loading_copy_no_float_weights(way, tmp_path):
    found = peaks_in_a_process(way, tmp_path)
    assert found.keys() == GOALS.keys()
    for step, goal in GOALS.items():
        assert 0 < found[step] <= goal, step
