"""Peak memory of `quantize`, `save_quantized` and `load_quantized`.

Models of equal Linear layers without biases, dynamic and static, each step in a process of its own:
the peak of its resident memory above what it had before the step, in sizes of the float model. The
goals are 1.0, 0.3 and 0.5 (Linux, x86). Blocks of 1 MiB and more go back to the system when they
are freed: what the C library keeps of them otherwise, some 16 MiB, differs from run to run.

    python benchmarks/memory.py [--megabytes 64 1024]
    python benchmarks/memory.py --megabytes 4096 --recipes dynamic --steps quantize save
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import qrecipe

RECIPES = {"dynamic": "builtin:x86-dynamic", "static": "builtin:x86-static"}
STEPS = ("quantize", "save", "load")
MIB = 2**20
SMALL = 4, 64
"""A model (layers, width) for what is loaded and cached once in a process."""


def shape_of(megabytes: int) -> tuple[int, int]:
    """Layers and width of a model of that size."""
    width = 2048 if megabytes < 1024 else 4096
    return megabytes * MIB // (4 * width * width), width


def float_model(layers: int, width: int) -> nn.Module:
    """Values keep their size from layer to layer, as int8 kernels take tiny ones for zero."""
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    for linear in linears:
        nn.init.uniform_(linear.weight, -((3 / width) ** 0.5), (3 / width) ** 0.5)
    return nn.Sequential(*linears).eval()


def quantized(model: nn.Module, width: int, recipe: str) -> nn.Module:
    batches = [torch.randn(1, width) for _ in range(3)]
    return qrecipe.quantize(model, RECIPES[recipe], batches)


def resident(key: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(step: Callable[[], object]) -> tuple[int, float]:
    """The peak in bytes above the start, and seconds of CPU."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, started = resident("VmRSS"), time.process_time()
    result = step()
    seconds = time.process_time() - started
    del result
    return resident("VmHWM") - before, seconds


def measure(step: str, recipe: str, megabytes: int, path: str) -> tuple[int, float]:
    """One step in this process; `save` writes the file that `load` reads."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    layers, width = shape_of(megabytes)
    warm, other = float_model(*SMALL), f"{path}.small"
    qrecipe.save_quantized(quantized(warm, SMALL[1], recipe), other)
    qrecipe.load_quantized(other, warm)
    model: nn.Module = float_model(layers, width)
    if step == "quantize":
        return peak_of(lambda: quantized(model, width, recipe))
    if step == "load":
        return peak_of(lambda: qrecipe.load_quantized(path, model))
    converted = quantized(model, width, recipe)

    return peak_of(lambda: qrecipe.save_quantized(converted, path))


def run(step: str, recipe: str, megabytes: int, path: str) -> None:
    child = [sys.executable, os.fspath(__file__), "--child", step, recipe, str(megabytes), path]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    told = subprocess.run(
        child, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    peak, seconds = int(told[0]), float(told[1])
    size = megabytes * MIB
    print(
        f"{megabytes:>5} MiB  {recipe:<8} {step:<9} {peak / size:5.2f} models  "
        f"{peak / MIB:>6.0f} MiB  {seconds:6.1f} s of CPU",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step, recipe, megabytes, path = options.child
        print(*measure(step, recipe, int(megabytes), path))
        return
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in options.megabytes:
            for recipe in options.recipes:
                for step in STEPS:
                    # a file to load is saved in any case
                    if step in options.steps or (step == "save" and "load" in options.steps):
                        run(step, recipe, megabytes, os.path.join(folder, "model.safetensors"))


if __name__ == "__main__":
    main()
