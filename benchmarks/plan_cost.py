"""How the cost of a plan grows with rules, names and sites: seconds of CPU time and exponents.

Each row is a kind of recipe; its size doubles from left to right. An exponent of 1 is linear. The
model of the rows by rules has 50 layers; the rows by names and by both have as many as the size.

    OMP_NUM_THREADS=1 python benchmarks/plan_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import qrecipe
from qrecipe.model.call import Inputs
from qrecipe.planning.decide import plan_of
from qrecipe.planning.inventory import inventory_of
from qrecipe.terminal.tables import render_table

HEAD = 'format = 1\nextends = "builtin:x86-static"\n'
LAYERS = 50
REPEATS = 2


@dataclass(frozen=True)
class Row:
    """What grows, the recipe of a size, and the layers of a size."""

    title: str
    text: Callable[[int], str]
    layers: Callable[[int], int]
    sizes: Sequence[int]


def rules(line: str, tier: str = "module_name") -> Callable[[int], str]:
    def text(count: int) -> str:
        lines = "\n".join(line.replace("$", str(number)) for number in range(count))
        return f"{HEAD}[rules.{tier}]\n{lines}\n"

    return text


OPTIONAL = rules('"layers.x$" = { qconfig = "float", optional = true }')
UNMATCHED = rules('"layers.x$" = "float"')
EACH = rules('"layers.$.0" = "float"')
GLOBS = rules('"layers.*x$" = { qconfig = "float", optional = true }')
TYPES = rules('"net.Layer$" = { qconfig = "float", optional = true }', "module_type")
MAXIMAL = {
    "**.{l*,?a}": rules(f'"{"**.{l*,?a}" * 45}$" = {{ qconfig = "float", optional = true }}'),
    "*1*0": rules(f'"layers.*{"*1*0" * 110}$" = {{ qconfig = "float", optional = true }}'),
    "{c,l}": rules(f'"{"{c,l}" * 90}$" = {{ qconfig = "float", optional = true }}'),
}
MANY = (250, 500, 1000, 2000)
FEW = (25, 50, 100, 200)


def rows() -> Iterator[Row]:
    def fixed(size: int) -> int:
        return LAYERS

    def growing(size: int) -> int:
        return size

    def of(text: Callable[[int], str], count: int) -> Callable[[int], str]:
        return lambda size: text(count)

    yield Row("optional rules that match nothing", OPTIONAL, fixed, MANY)
    yield Row("rules that match nothing (errors)", UNMATCHED, fixed, MANY)
    yield Row("globs", GLOBS, fixed, MANY)
    yield Row("types", TYPES, fixed, MANY)
    for unit, text in MAXIMAL.items():
        yield Row(f"globs of 500 characters, {unit}", text, fixed, (25, 50, 100, 200))
    yield Row("sites, 2,000 optional rules", of(OPTIONAL, 2_000), growing, FEW)
    yield Row("sites, 2,000 errors", of(UNMATCHED, 2_000), growing, FEW)
    yield Row("sites, 2,000 globs", of(GLOBS, 2_000), growing, FEW)
    for unit, text in MAXIMAL.items():
        yield Row(f"sites, 200 globs {unit}", of(text, 200), growing, FEW)
    yield Row("sites, and a rule for each", EACH, growing, FEW)


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        pairs = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(count))
        self.layers = nn.Sequential(*pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


def seconds(row: Row, size: int) -> float:
    """The CPU time from the recipe's text to the plan or its error text, without the trace."""
    model, inputs = Layers(row.layers(size)).eval(), Inputs.from_batch(torch.randn(2, 4))
    inventory, text = inventory_of(model, qrecipe.parse_recipe(HEAD), inputs), row.text(size)
    spent = []
    for _ in range(REPEATS):
        gc.collect()
        start = time.process_time()
        try:
            plan_of(inventory, qrecipe.parse_recipe(text), inputs)
        except qrecipe.QRecipeError as error:
            str(error)
        spent.append(time.process_time() - start)
    return min(spent)


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    x, y = [list(map(math.log, values)) for values in (sizes, costs)]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the three smallest sizes only")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = []
    for row in rows():
        sizes = row.sizes[:3] if quick else row.sizes
        costs = [seconds(row, size) for size in sizes]
        figures = [f"{cost:.3f}" for cost in costs]
        of = f"{sizes[0]} to {sizes[-1]}"
        table.append((row.title, of, *figures, f"{exponent(sizes, costs):.2f}"))
        print(" ".join(table[-1]), flush=True)
    columns = [f"size {number + 1}" for number in range(len(table[0]) - 3)]
    print("\n" + render_table(("what grows", "sizes", *columns, "exponent"), table))


if __name__ == "__main__":
    main()
