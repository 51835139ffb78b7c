"""How fast each choice of sites is: float, all that int8 can do, `suggest`, and `fastest`.

Models of torchvision, timm, transformers and torch that the tests know, at batch 1 and 8, with one
thread. For each, in milliseconds of CPU time, of calls in turns (medians of --runs, fewer for slow
models; before each, the model is called once, as in use):

- the eager float model, and the same with images in channels_last;
- every site in int8 that has a kernel (the global rule of builtin:x86-static-minmax);
- the recipe of `qrecipe.suggest`;
- what `qrecipe.fastest` makes of that recipe, and the share of its time that the cut predicted to
  save. Where it leaves the recipe as it is, that is the same model, and measured once.

Each row is appended to --rows as it is measured; what is there already is not measured again. At
the end, all rows are printed as a Markdown table, with the medians of float over each choice, and
the models that are slower than float beyond noise: with the codes of the plan's warnings about
speed (QR207, QR208), or "without a word".

    OMP_NUM_THREADS=1 python benchmarks/choices.py [--rows FILE] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from real_models import SIZES, models
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qrecipe
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.provenance import stored_plan
from qrecipe.measure.turns import Speed

from libraries import Written, call  # isort: skip - real_models makes it known

CHOICES = ("float", "channels_last", "all int8", "suggest", "fastest")
ABOUT_SPEED = {"QR207", "QR208"}
BATCHES = 3
FEWEST_RUNS = 5
LONGEST = 8.0
"""Seconds of CPU time for the calls of one row, unless the fewest runs take longer."""


@dataclass
class Row:
    """One model at one batch size: seconds by choice in each round, and codes of warnings."""

    name: str
    size: int
    seconds: dict[str, list[float]]
    codes: dict[str, list[str]] = field(default_factory=dict)
    predicted: float | None = None
    why: str = ""

    def ms(self, choice: str) -> float:
        return statistics.median(self.seconds[choice]) * 1000

    def over(self, choice: str) -> float:
        """How many times as fast as float a choice is."""
        return self.ms("float") / self.ms(choice)

    def is_slower(self, choice: str) -> bool:
        return Speed.of(self.seconds[choice], self.seconds["float"]).is_slower


def measure(name: str, written: Written, size: int, choices: Sequence[str], runs: int) -> Row:
    model, batch = written.model(), written.batch(size)
    batches = [written.batch(size) for _ in range(BATCHES)]
    row = Row(name, size, {})
    calls: dict[str, Callable[[], Any]] = {"float": lambda: call(model, batch)}

    def add(choice: str, recipe: Any) -> None:
        converted = qrecipe.quantize(model, recipe, batches, progress=False)
        plan = stored_plan(qrecipe.provenance(converted))
        row.codes[choice] = sorted({each.code for each in plan.warnings} & ABOUT_SPEED)
        calls[choice] = lambda: call(converted, batch)

    if "channels_last" in choices and any(isinstance(m, nn.Conv2d) for m in model.modules()):
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        images = pytree.tree_map_only(Tensor, _in_channels_last, batch)
        calls["channels_last"] = lambda: call(last, images)
    if "all int8" in choices:
        with suppress(QRecipeError):  # not every model can be static
            add("all int8", "builtin:x86-static-minmax")
    suggested = qrecipe.suggest(model, batches[0], num_batches=BATCHES)
    add("suggest", suggested)
    if "fastest" in choices:
        found = qrecipe.fastest(model, suggested, batches, progress=False)
        row.predicted = found.predicted_gain
        if found.winner != "recipe":
            add("fastest", found.recipe)
    row.seconds = _in_turns(calls, runs)
    if "fastest" in choices:
        row.seconds.setdefault("fastest", row.seconds["suggest"])
    return row


def _in_channels_last(tensor: Tensor) -> Tensor:
    is_image = tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor


def _in_turns(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.process_time()
    with torch.no_grad():
        for run in range(runs + 2):
            for name, each in calls.items():
                each()  # the model before it has left its own weights in the caches
                started = time.process_time()
                each()
                if run > 1:
                    taken[name].append(time.process_time() - started)
            if run > FEWEST_RUNS and time.process_time() - begun > LONGEST:
                break
    return taken


def line(row: Row) -> str:
    cells = [f"{row.ms(choice):.2f}" if choice in row.seconds else "-" for choice in CHOICES]
    if row.predicted is None:
        cells += ["-"] * 2
    else:
        cells += [f"{row.predicted:.0%}", f"{1 - row.ms('fastest') / row.ms('suggest'):.0%}"]
    return f"| {row.name} | {row.size} | {' | '.join(cells)} |"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    for size in SIZES:
        for choice in CHOICES[1:]:
            found = [row for row in rows if row.size == size and choice in row.seconds]
            if not found:
                continue
            median = statistics.median(row.over(choice) for row in found)
            slower = [
                f"{row.name} {row.over(choice):.2f} ({_word(row, choice)})"
                for row in found
                if row.is_slower(choice)
            ]
            yield (
                f"batch {size}, {choice}: median float/{choice} {median:.2f} of {len(found)}; "
                f"slower than float: {', '.join(slower) or 'none'}"
            )


def _word(row: Row, choice: str) -> str:
    return ", ".join(row.codes.get(choice, row.codes["suggest"])) or "without a word"


def stored(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**json.loads(each)) for each in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast each choice of sites is.")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--choices", nargs="*", choices=CHOICES[1:], default=CHOICES[1:])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known, rows = models(), stored(arguments.rows)
    done = {(row.name, row.size) for row in rows}
    for name in arguments.only or known:
        for size in arguments.sizes:
            if (name, size) in done:
                continue
            try:
                row = measure(name, known[name], size, arguments.choices, arguments.runs)
            except (QRecipeError, RuntimeError) as error:
                row = Row(name, size, {}, why=str(error))
                print(f"{name}, batch {size}: {error}", file=sys.stderr)
            rows.append(row)
            if arguments.rows is not None:
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    measured = [row for row in rows if row.seconds]
    heads = (*CHOICES, "predicted", "measured")
    print(f"| model | batch | {' | '.join(heads)} |")
    print(f"|---|--:|{'--:|' * len(heads)}")
    print("\n".join([*map(line, measured), "", *summary(measured)]))


if __name__ == "__main__":
    main()
