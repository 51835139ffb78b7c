"""What `qrecipe.quantize`, audit included, costs compared with the same steps by hand.

By hand: deepcopy, ``prepare_fx``, calibration, ``convert_fx``. A ResNet-18-like net at 64x64, 8
batches of 16, one thread, CPU time, interleaved in one process, medians of the ratios by pair. The
outputs are equal where the CPU has VNNI; without, convolutions of few channels run on another
engine. Peak memory is measured in a process for each way, in sizes of the float model.

Then what each step and each check takes, as the median of as many further runs.

    python benchmarks/overhead.py [--pairs 15]
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nets import ResNet18Like, warmed
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import qrecipe
from qrecipe.observers.qconfig import qconfig

RECIPE = "builtin:x86-static"


def by_hand(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    recipe = qrecipe.load_recipe(RECIPE)
    mapping = QConfigMapping().set_global(qconfig(recipe.qconfigs["int8"], "ptq"))
    prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted: nn.Module = convert_fx(prepared)
    return converted


def by_qrecipe(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    return qrecipe.quantize(model, RECIPE, batches)


WAYS: dict[str, Callable[[nn.Module, list[Tensor]], nn.Module]] = {
    "by hand": by_hand,
    "qrecipe": by_qrecipe,
}


def setting() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = warmed(ResNet18Like(), 16, 3, 64, 64)
    return model, [torch.randn(16, 3, 64, 64) for _ in range(8)]


def cpu_seconds(way: str, model: nn.Module, batches: list[Tensor]) -> float:
    gc.collect()  # what the other way left behind
    start = time.process_time()
    WAYS[way](model, batches)
    return time.process_time() - start


def compare_time(pairs: int) -> None:
    model, batches = setting()
    outputs = [way(model, batches)(batches[0]) for way in WAYS.values()]
    print(f"outputs equal: {torch.equal(*outputs)}")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(pairs):
        # take turns, because the second run finds warm caches
        for way in list(WAYS) if index % 2 else reversed(list(WAYS)):
            times[way].append(cpu_seconds(way, model, batches))
    for way, seconds in times.items():
        median, least = statistics.median(seconds), min(seconds)
        print(f"{way:>8}: median {median:.3f} s of CPU, least {least:.3f} s")
    ratios = [a / b for a, b in zip(times["qrecipe"], times["by hand"], strict=True)]
    medians = statistics.median(times["qrecipe"]) / statistics.median(times["by hand"])
    print(f"   ratio: {medians:.3f} of the medians, {statistics.median(ratios):.3f} by pair")


STEPS = {
    "trace": "qrecipe.model.trace:trace",
    "check: the graph is the model": "qrecipe.model.graph_sites:record_values",
    "fuse": "qrecipe.model.graph_sites:fused_graph",
    "check: the fused graph is the model": "qrecipe.pipeline:prove_by_call",
    "plan": "qrecipe.pipeline:plan_of",
    "prepare": "qrecipe.execution.fx.convert:prepared_copy",
    "check: the prepared graph is the fused one": "qrecipe.execution.fx.executor:prove_prepared",
    "run a batch of calibration": "qrecipe.execution.calibration:_run",
    "check: what the ranges clip": "qrecipe.execution.calibration:clipping_of",
    "convert to the reference": "qrecipe.execution.fx.convert:reference",
    "check: conversion only rounds": "qrecipe.execution.fx.executor:check_conversion",
    "check: run the reference": "qrecipe.execution.fx.executor:run_on_head",
    "lower to kernels": "qrecipe.execution.fx.convert:lowered",
    "check: structure and kernels": "qrecipe.execution.fx.executor:audit",
    "check: another batch size": "qrecipe.execution.batch_sizes:shortfall",
}
"""Functions of qrecipe by what they do; none runs inside another."""


def print_steps(runs: int) -> None:
    model, batches = setting()
    spent: dict[str, list[float]] = {label: [] for label in STEPS}
    with ExitStack() as patches:
        for label, target in STEPS.items():
            module, name = target.split(":")
            honest = getattr(importlib.import_module(module), name)
            timed = partial(timed_call, honest, spent[label])
            patches.enter_context(mock.patch(f"{module}.{name}", timed))
        by_qrecipe(model, batches)
        for seconds in spent.values():
            seconds.clear()
        whole = [cpu_seconds("qrecipe", model, batches) for _ in range(runs)]
    total = statistics.median(whole)
    for label, seconds in spent.items():
        share = statistics.median(seconds) * len(seconds) / runs
        print(f"{label:>42}: {share:.4f} s, {share / total:.1%}")


def timed_call(function: Callable[..., Any], seconds: list[float], *args: Any, **kw: Any) -> Any:
    start = time.process_time()
    try:
        return function(*args, **kw)
    finally:
        seconds.append(time.process_time() - start)


def print_peak(way: str) -> None:
    model, batches = setting()
    with torch.no_grad():
        model(batches[0])
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    WAYS[way](model, batches)  # imports and caches of the first call don't count
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = resident_kib("VmRSS")
    WAYS[way](model, batches)
    print(f"{(resident_kib('VmHWM') - before) * 1024 / size:.2f}")


def resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def compare_memory() -> None:
    peaks = {}
    for way in WAYS:
        runs = [
            subprocess.run(
                [sys.executable, os.fspath(__file__), "--peak", way],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for _ in range(3)
        ]
        peaks[way] = statistics.median(float(run) for run in runs)
        print(f"{way:>8}: peak memory {peaks[way]:.2f} models above the start")
    print(f"   extra: {peaks['qrecipe'] - peaks['by hand']:+.2f} models")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--peak", choices=list(WAYS))
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak)
        return
    compare_time(options.pairs)
    print_steps(options.pairs)
    compare_memory()


if __name__ == "__main__":
    main()
