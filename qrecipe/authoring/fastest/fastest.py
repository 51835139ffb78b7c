"""Choose int8 or float for each site by what was measured on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.authoring.fastest.costs import costs_of
from qrecipe.authoring.fastest.cut import mixture_of
from qrecipe.authoring.fastest.result import Fastest, Race, found, reasons_of
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.batches import Forward
from qrecipe.execution.engine import engine_of
from qrecipe.measure.profile.passes import Pass
from qrecipe.measure.profile.profile import Bench, bench_of, measured, run_in_turn
from qrecipe.pipeline import quantize
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.overlay import overlay_recipe, overlay_values
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress

_FEWEST_ROUNDS = 30
_MOST_ROUNDS = 200
_ENOUGH = 3.0
"""Seconds for a race, unless the fewest rounds take longer."""


@neutral
@ranks.alone()
def fastest(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Fastest:
    """Find out which sites to leave float, so that the model is as fast as it can be here.

    The model is profiled as by `qrecipe.profile`, and the times of sites and boundaries give the
    best choice by a minimum cut. If that saves 10 % by prediction, it is quantized and timed in
    turns with the recipe as it is and with the float model. The result is the fastest of them, and
    the recipe itself unless something else is faster beyond noise.

    Times are taken as by `qrecipe.profile`, on the first batch. Accuracy is not looked at; more
    sites in float usually lose less.

    Args:
        batches: as in `qrecipe.calibrate`.

    Raises what `qrecipe.profile` raises.
    """
    base = load_recipe(recipe)
    bench = bench_of(model, base, batches, forward, progress)
    profile = measured(bench, progress)
    costs = costs_of(profile, bench.plan, bench.inventory.structure)
    members = bench.plan.members
    mixture = mixture_of(costs)
    mixed = None
    if mixture.is_promising:
        values = overlay_values(reasons_of(costs, mixture.floats), members)
        try:
            with unwarned():  # the recipe as it is has given its warnings
                calibrated = replace(overlay_recipe(base, values), phase="ptq")
                mixed = quantize(model, calibrated, bench.held, forward=forward, progress=progress)
        except QRecipeError as error:
            mixture = replace(mixture, failure=error.findings[0].message)
    return found(base, profile, costs, members, mixture, race(bench, mixed, progress))


def race(bench: Bench, mixed: nn.Module | None, progress: Progress | bool | None) -> Race:
    """Time the float model, the recipe as it is and the mixture, if there is one, in turns.

    Each runs twice and counts once: the one before it has used the caches, which made the first run
    of a small model up to a third slower.
    """
    models = [bench.eager, bench.converted, *([] if mixed is None else [mixed])]
    passes = [Pass(model, bench.calls) for model in models]
    turns = [turn for each in passes for turn in (Pass(each.model, bench.calls), each)]
    with engine_of(bench.plan), torch.no_grad(), quiet():
        start = time.perf_counter()
        for turn in turns:
            turn.run()
        possible = int(_ENOUGH / (time.perf_counter() - start))
        rounds = min(max(_FEWEST_ROUNDS, possible), _MOST_ROUNDS)
        run_in_turn(turns, chosen_progress(progress, "comparing"), rounds)
    return Race(*(each.whole.seconds("") for each in passes))
