"""From calibration to training on a stressed network: `python examples/digits/story.py [SEED ...]`.

The digits network with a synthetic rescale (`rescale.py`) is quantized in four ways: calibrated;
calibrated with the two worst sites kept float; with a recipe found by a search within a budget;
trained. docs/story.md explains each step. Three seeds determine the rescaling and the training
batches; each takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from digits import DigitNet, calibration, evaluate, factory
from rescale import rescaled
from train_quantized import SEEDS, trained

import qrecipe

RECIPE = "builtin:x86-static"
KEEP_FLOAT = 2
MAX_DROP = 0.003
"""Three of the 1,000 digits that are evaluated."""

HEADER = ("seed", "float", "calibrated", "overlay", "left float", "tuned", "left float", "trained")


@dataclass(frozen=True, slots=True)
class Partial:
    """The accuracy of a model, 0 to 1, and the sites that stayed float."""

    accuracy: float
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chapter:
    """Accuracies of one seed, 0 to 1; ``is_within`` tells whether the search met its budget."""

    seed: int
    unquantized: float
    calibrated: float
    overlay: Partial
    tuned: Partial
    is_within: bool
    trained: float


def main() -> None:
    """Tell the story of each seed, and print the table."""
    parser = argparse.ArgumentParser(description="Quantize the stressed digits network.")
    parser.add_argument("seeds", metavar="SEED", nargs="*", type=int, default=SEEDS)
    torch.set_num_threads(1)
    print(table([chapter(seed) for seed in parser.parse_args().seeds]))


def chapter(seed: int) -> Chapter:
    """All four ways for the network that this seed gives."""
    model = rescaled(factory()[0], seed)
    announce(seed, "calibrating")
    calibrated = evaluate(qrecipe.quantize(model, RECIPE, calibration()))
    announce(seed, "ranking the sites")
    ranking = qrecipe.sensitivity(model, RECIPE, calibration())
    overlay = partial(model, ranking.to_recipe(keep_float=KEEP_FLOAT))
    announce(seed, "searching for a recipe")
    tuned = qrecipe.tune(model, RECIPE, calibration(), evaluate, max_drop=MAX_DROP)
    found = partial(model, tuned.recipe)
    announce(seed, "training")
    torch.manual_seed(seed)
    accuracy = evaluate(trained(model))
    return Chapter(seed, evaluate(model), calibrated, overlay, found, tuned.reached, accuracy)


def partial(model: DigitNet, recipe: qrecipe.Recipe) -> Partial:
    """The result of this recipe, and the sites that it keeps float."""
    plan = qrecipe.plan(model, recipe, calibration()[0])
    left = tuple(site.name for site in plan.sites if site.verdict == "float")
    return Partial(evaluate(qrecipe.quantize(model, recipe, calibration())), left)


def table(chapters: Sequence[Chapter]) -> str:
    """One row for each seed; an asterisk if the search did not meet its budget."""
    rows = [HEADER, *map(row, chapters)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    if not all(told.is_within for told in chapters):
        lines.append(f"* more than {MAX_DROP} below float: the best that the search found")
    return "\n".join(lines)


def row(told: Chapter) -> tuple[str, ...]:
    """The cells of one seed."""
    return (
        str(told.seed),
        f"{told.unquantized:.3f}",
        f"{told.calibrated:.3f}",
        f"{told.overlay.accuracy:.3f}",
        ", ".join(told.overlay.sites),
        f"{told.tuned.accuracy:.3f}{'' if told.is_within else '*'}",
        ", ".join(told.tuned.sites) or "nothing",
        f"{told.trained:.3f}",
    )


def announce(seed: int, what: str) -> None:
    """Show progress on a terminal, and nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"seed {seed}: {what}", file=sys.stderr)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=qrecipe.QRecipeWarning)
    main()
