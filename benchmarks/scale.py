"""How the cost of each step grows with the number of layers, by qrecipe and by hand.

A chain of Linear and ReLU, and one of residual blocks (convolution, BatchNorm, addition, ReLU), at
30 to 1,000 layers: CPU seconds of plan, quantize, save, load and sensitivity (the estimate), on one
thread, and of deepcopy, ``prepare_fx``, calibration and ``convert_fx`` by hand. The exponent of a
step is the slope of a line through the logarithms of its seconds and layers: 1 is linear, 2 is
quadratic. Python's collector does not see what was there before a step: a full collection walks all
objects of torch (0.2 s), once in some 200 layers, so that the smallest chains would go without.

    python benchmarks/scale.py [--layers 30 100 300 1000] [--kinds linear residual]

The status is 1 if an exponent of qrecipe is above 1.1, or if quantizing the largest chain takes
more than 4 times as long as by hand.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nets import LinearChain, ResidualChain
from overhead import RECIPE, by_hand
from torch import Tensor, nn

import qrecipe

STEPS = ("plan", "quantize", "save", "load", "sensitivity", "by hand")
HIGHEST_EXPONENT = 1.1
HIGHEST_RATIO = 4.0
BATCHES = 10
MEASURED = 2
"""The number of batches for sensitivity."""

REPEATED = 300
"""Chains of fewer layers are measured until they have so many in all; medians count."""

Setting = tuple[nn.Module, list[Tensor]]


def linear(layers: int) -> Setting:
    return LinearChain(layers).eval(), [torch.randn(2, 64) for _ in range(BATCHES)]


def residual(layers: int) -> Setting:
    return ResidualChain(layers).eval(), [torch.randn(1, 8, 8, 8) for _ in range(BATCHES)]


KINDS: dict[str, Callable[[int], Setting]] = {"linear": linear, "residual": residual}


def seconds_of_steps(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """CPU seconds of each step."""
    seconds: dict[str, float] = {}

    def timed(step: str, run: Callable[[], Any]) -> Any:
        gc.collect()
        gc.freeze()
        start = time.process_time()
        result = run()
        seconds[step] = time.process_time() - start
        gc.unfreeze()
        return result

    timed("plan", lambda: qrecipe.plan(model, RECIPE, batches[0]))
    quantized = timed("quantize", lambda: qrecipe.quantize(model, RECIPE, batches))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        timed("save", lambda: qrecipe.save_quantized(quantized, path))
        timed("load", lambda: qrecipe.load_quantized(path, model))
    few = batches[:MEASURED]
    timed("sensitivity", lambda: qrecipe.sensitivity(model, RECIPE, few, method="estimate"))
    timed("by hand", lambda: by_hand(model, batches))
    return seconds


def exponent(layers: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the logarithms, by least squares."""
    xs, ys = [math.log(count) for count in layers], [math.log(each) for each in seconds]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return products / sum((a - x) ** 2 for a in xs)


def measure(kind: str, layers: Sequence[int]) -> bool:
    """Print the table of one kind of chain; whether it is within the limits."""
    seconds_of_steps(*KINDS[kind](3))  # imports and caches of the first calls do not count
    found: dict[str, list[float]] = {step: [] for step in STEPS}
    print(f"{kind:<10}" + "".join(f"{step:>12}" for step in STEPS), flush=True)
    for count in layers:
        runs = [seconds_of_steps(*KINDS[kind](count)) for _ in range(max(1, REPEATED // count))]
        for step in STEPS:
            found[step].append(statistics.median(run[step] for run in runs))
        row = "".join(f"{found[step][-1]:12.2f}" for step in STEPS)
        print(f"{count:>8,}  {row}", flush=True)
    exponents = {step: exponent(layers, found[step]) for step in STEPS}
    print("exponent  " + "".join(f"{exponents[step]:12.2f}" for step in STEPS))
    ratio = found["quantize"][-1] / found["by hand"][-1]
    print(f"{layers[-1]:,} layers quantize in {ratio:.2f} times the seconds by hand\n")
    own = [exponents[step] for step in STEPS if step != "by hand"]
    return max(own) <= HIGHEST_EXPONENT and ratio <= HIGHEST_RATIO


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 100, 300, 1000])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    within = [measure(kind, sorted(options.layers)) for kind in options.kinds]
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(main())
