"""Peaks of memory of a way to quantize, in a process of their own: `python peaks.py WAY FOLDER`.

Prints the peak of each step above what was there before it, in sizes of the float model (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import qrecipe

WIDTH, LAYERS = 704, 8
SIZE = 4 * LAYERS * WIDTH**2
FORGET_PEAK = Path("/proc/self/clear_refs")
# Blocks of this size go back to the system when they are freed. What the C library keeps otherwise
# depends on everything that the process did before.
BLOCK = 2**16


def linears(layers: int, width: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).eval()


class Branching(nn.Module):
    """Without a graph, so that it is quantized module by module."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.body = linears(layers, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + 1 if x.sum() > 0 else x)


def with_batches(recipe: str):
    return lambda model, data: qrecipe.quantize(model, recipe, data, progress=False)


def without_batches(model, data):
    return qrecipe.quantize(model, "builtin:x86-dynamic", example_inputs=data[0])


WAYS = {
    "static": (with_batches("builtin:x86-static"), linears),
    "dynamic, without batches": (without_batches, linears),
    "module by module": (with_batches("builtin:x86-dynamic"), Branching),
}


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(step: Callable[..., object], *arguments: object) -> tuple[float, object]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is used again would not be seen
    FORGET_PEAK.write_text("5")
    before = resident("VmRSS")
    result = step(*arguments)
    return (resident("VmHWM") - before) / SIZE, result


def peaks(way: str, folder: Path) -> dict[str, float]:
    quantize, make = WAYS[way]
    path = folder / "model.safetensors"
    small = make(1, 8).eval()  # for what is loaded and cached once
    qrecipe.save_quantized(quantize(small, [torch.randn(1, 8)] * 3), path)
    qrecipe.load_quantized(path, small)

    model, data = make(LAYERS, WIDTH).eval(), [torch.randn(1, WIDTH) for _ in range(3)]
    found = {}
    found["quantize"], converted = peak_of(quantize, model, data)
    found["save"], _ = peak_of(qrecipe.save_quantized, converted, path)
    del converted
    found["load"], _ = peak_of(qrecipe.load_quantized, path, model)
    return found


def peaks_in_a_process(way: str, folder: Path) -> dict[str, float]:
    """The peak of each step."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(BLOCK), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, way, folder],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(peaks(sys.argv[1], Path(sys.argv[2]))))
