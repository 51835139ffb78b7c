"""No step holds a second copy of the float weights: `benchmarks/memory.py` has the figures."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
from runs import silent
from torch import nn

import qrecipe

WIDTH, LAYERS = 704, 16
SIZE = 4 * LAYERS * WIDTH**2
FORGET_PEAK = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(
    not os.access(FORGET_PEAK, os.W_OK), reason="the peak of memory is read as Linux tells it"
)


def linears(layers=LAYERS, width=WIDTH):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).eval()


class Branching(nn.Module):
    """Without a graph, so that it is quantized module by module."""

    def __init__(self, *size):
        super().__init__()
        self.body = linears(*size)

    def forward(self, x):
        return self.body(x + 1 if x.sum() > 0 else x)


def batches(width=WIDTH):
    return [torch.randn(1, width) for _ in range(3)]


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(step, *arguments):
    """In sizes of the float model, above what was there before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is used again would not be seen
    FORGET_PEAK.write_text("5")
    before = resident("VmRSS")
    result = step(*arguments)
    return (resident("VmHWM") - before) / SIZE, result


def with_batches(recipe):
    return lambda model, data: qrecipe.quantize(model, recipe, data, progress=silent)


def without_batches(model, data):
    return qrecipe.quantize(model, "builtin:x86-dynamic", example_inputs=data[0])


WAYS = {
    "static": (with_batches("builtin:x86-static"), linears),
    "dynamic, without batches": (without_batches, linears),
    "module by module": (with_batches("builtin:x86-dynamic"), Branching),
}


@pytest.mark.filterwarnings("ignore:QR2")
@pytest.mark.parametrize("way", WAYS)
def test_quantizing_saving_and_loading_copy_no_float_weights(way, tmp_path):
    quantize, make = WAYS[way]
    path = tmp_path / "model.safetensors"
    small = make(1, 8)  # for what is loaded and cached once
    qrecipe.save_quantized(quantize(small, batches(8)), path)
    qrecipe.load_quantized(path, small)

    model, data = make(), batches()
    peaks = {}
    peaks["quantize"], converted = peak_of(quantize, model, data)
    peaks["save"], _ = peak_of(qrecipe.save_quantized, converted, path)
    del converted
    peaks["load"], _ = peak_of(qrecipe.load_quantized, path, model)
    goals = {"quantize": 1.0, "save": 0.3, "load": 0.5}
    assert {step: peak for step, peak in peaks.items() if peak > goals[step]} == {}
