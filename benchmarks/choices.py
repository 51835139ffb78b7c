"""How fast each choice of sites is: float, all that int8 can do, `suggest`, and `fastest`.

Models of torchvision, timm, transformers and torch that the tests know, at batch 1 and 8, with one
thread. Printed for each, as a Markdown table, in milliseconds of CPU time, of calls in turns (the
median of --runs):

- the eager float model, and the same with images in channels_last;
- every site in int8 that has a kernel (the global rule of builtin:x86-static-minmax);
- the recipe of `qrecipe.suggest`;
- what `qrecipe.fastest` makes of that recipe, and the share of its time that the cut predicted to
  save.

    OMP_NUM_THREADS=1 python benchmarks/choices.py [--runs 15] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from real_models import SIZES, models
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qrecipe
from qrecipe.errors.findings import QRecipeError

from libraries import Written, call  # isort: skip - real_models makes it known

CHOICES = ("float", "channels_last", "all int8", "suggest", "fastest")
BATCHES = 6


def measure(written: Written, size: int, runs: int) -> tuple[dict[str, float], float]:
    """Milliseconds by choice, and the gain that `fastest` predicted."""
    model, batch = written.model(), written.batch(size)
    batches = [written.batch(size) for _ in range(BATCHES)]
    suggested = qrecipe.suggest(model, batches[0], num_batches=BATCHES)
    found = qrecipe.fastest(model, suggested, batches, progress=False)
    calls: dict[str, Callable[[], Any]] = {
        "float": lambda: call(model, batch),
        "suggest": _called(model, suggested, batches, batch),
        "fastest": _called(model, found.recipe, batches, batch),
    }
    if any(isinstance(each, nn.Conv2d) for each in model.modules()):
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        images = pytree.tree_map_only(Tensor, _in_channels_last, batch)
        calls["channels_last"] = lambda: call(last, images)
    with suppress(QRecipeError):  # not every model can be static
        calls["all int8"] = _called(model, "builtin:x86-static-minmax", batches, batch)
    return _in_turns(calls, runs), found.predicted_gain


def _called(model: nn.Module, recipe: Any, batches: list[Any], batch: Any) -> Callable[[], Any]:
    converted = qrecipe.quantize(model, recipe, batches, progress=False)
    return lambda: call(converted, batch)


def _in_channels_last(tensor: Tensor) -> Tensor:
    is_image = tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor


def _in_turns(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for run in range(runs + 2):
            for name, each in calls.items():
                started = time.process_time()
                each()
                if run > 1:
                    taken[name].append(time.process_time() - started)
    return {name: statistics.median(times) * 1000 for name, times in taken.items()}


def line(name: str, size: int, times: Mapping[str, float], predicted: float) -> str:
    cells = [f"{times[choice]:.2f}" if choice in times else "-" for choice in CHOICES]
    measured = 1 - times["fastest"] / times["suggest"]
    cells += [f"{times['float'] / times['fastest']:.2f}", f"{predicted:.0%}", f"{measured:.0%}"]
    return f"| {name} | {size} | {' | '.join(cells)} |"


def summary(rows: Mapping[tuple[str, int], Mapping[str, float]]) -> Iterator[str]:
    for size in SIZES:
        for choice in ("suggest", "fastest"):
            ratios = {
                name: times["float"] / times[choice]
                for (name, of), times in rows.items()
                if of == size
            }
            if not ratios:
                continue
            slower = [name for name, ratio in ratios.items() if ratio < 1]
            median = statistics.median(ratios.values())
            names = ", ".join(slower) or "none"
            yield f"batch {size}, {choice}: median float/int8 {median:.2f}; slower: {names}"


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast each choice of sites is.")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = models()
    if arguments.only:
        chosen = {name: chosen[name] for name in arguments.only}
    rows: dict[tuple[str, int], Mapping[str, float]] = {}
    heads = (*CHOICES, "float/fastest", "predicted", "measured")
    print(f"| model | batch | {' | '.join(heads)} |")
    print(f"|---|--:|{'--:|' * len(heads)}")
    for name, written in chosen.items():
        for size in SIZES:
            try:
                times, predicted = measure(written, size, arguments.runs)
            except (QRecipeError, RuntimeError) as error:
                print(f"{name}, batch {size}: {error}", file=sys.stderr)
                continue
            rows[name, size] = times
            print(line(name, size, times, predicted), flush=True)
    print("\n".join(["", *summary(rows)]))


if __name__ == "__main__":
    main()
