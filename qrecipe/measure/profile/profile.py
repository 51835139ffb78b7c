"""Profile a model: each site as float and as int8, and each boundary, in the shapes it has."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.execution.batches import Forward, describe_batch, inputs_of_batch, peek
from qrecipe.execution.engine import engine_of
from qrecipe.execution.provenance import converted_graphs, provenance
from qrecipe.measure.batches import calls_of, rereadable
from qrecipe.measure.profile.boundaries import Boundary, boundary_of
from qrecipe.measure.profile.report import Conditions, Profile, ProfiledBoundary, ProfiledSite
from qrecipe.measure.profile.timing import NO_TIME, Stopwatch, Timing
from qrecipe.measure.watched import Watched, watched_modules
from qrecipe.model.addresses import site_of
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.pipeline import quantize
from qrecipe.planning.cpu import cpu_name
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress

ROUNDS = 15
_WARM_UP = 2

Key = str | Boundary
"""A site, a boundary, or the empty name for everything else."""


@neutral
def profile(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Profile:
    """Measure the time of each site, as float and as int8, and of each boundary between them.

    The model is quantized, then it runs on the first batch round after round: all its sites in
    float, then all of the converted model, and both as a whole. So each site is timed between its
    neighbours, in the shapes and layouts that it has there. Times are wall time with torch's
    current number of threads.

    Args:
        batches: as in `qrecipe.calibrate`.

    Raises what `qrecipe.quantize` raises.
    """
    loaded = replace(load_recipe(recipe), phase="ptq")  # training changes no kernel
    held = rereadable(batches, loaded.calibration.max_batches)
    converted = quantize(model, loaded, held, forward=forward, progress=progress)
    first, _ = peek(held)
    with inputs_of_batch(model, first, forward) as inputs:
        inventory = inventory_of(model, loaded, inputs)
    return measured(model, converted, inventory, first, forward, progress)


def measured(
    model: nn.Module,
    converted: nn.Module,
    inventory: Inventory,
    batch: Any,
    forward: Forward | None,
    progress: Progress | bool | None,
) -> Profile:
    """The profile of a model that is quantized already; ``inventory`` is of the float model."""
    plan = Plan.from_json(provenance(converted).plan)
    floats, ints = Stopwatch[Key](), Stopwatch[Key]()
    eager = runnable_copy(model)
    fused = with_parts(inventory.model, {p.path: p.graph_module for p in inventory.parts})
    with engine_of(plan), torch.no_grad(), quiet():
        calls = [call.inputs for call in calls_of(eager, batch, 0, forward)]
        watched = {
            "float": _watched_float(inventory, floats),
            "int8": _watched_converted(inventory, converted, ints),
        }
        clocks = {"float": floats, "int8": ints}
        whole = {name: Stopwatch[str]() for name in ("eager", "fused", "int8")}
        models = {"eager": eager, "fused": fused.eval(), "int8": converted}
        show = chosen_progress(progress, "profiling")
        for number in range(_WARM_UP + ROUNDS):
            for name, each in watched.items():
                clocks[name].start_round()
                _run(each, calls)
            for name, each in models.items():
                whole[name].start_round()
                whole[name].add("", _run(each, calls))
            show(number + 1, _WARM_UP + ROUNDS)
    rounds = (floats.rounds, ints.rounds, *(each.rounds for each in whole.values()))
    for warm in rounds:
        del warm[:_WARM_UP]
    threads, version = torch.get_num_threads(), str(torch.__version__)
    return _report(
        plan,
        floats.timings(),
        ints.timings(),
        {name: stopwatch.timings()[""] for name, stopwatch in whole.items()},
        Conditions(cpu_name(), threads, describe_batch(batch), version, ROUNDS),
    )


def _run(model: nn.Module, calls: Sequence[Inputs]) -> float:
    """Seconds of all calls that one batch leads to."""
    start = time.perf_counter()
    for inputs in calls:
        inputs.call(model)
    return time.perf_counter() - start


def _watched_float(inventory: Inventory, stopwatch: Stopwatch[Key]) -> nn.Module:
    if inventory.untraced is not None:
        return _watched_modules(inventory.model, inventory, stopwatch)

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        stopwatch.add(site_of(node) or "", seconds)

    parts = {part.path: Watched(part.graph_module, see) for part in inventory.parts}
    return with_parts(inventory.model, parts).eval()


def _watched_converted(
    inventory: Inventory, converted: nn.Module, stopwatch: Stopwatch[Key]
) -> nn.Module:
    if inventory.untraced is not None:
        return _watched_modules(converted, inventory, stopwatch)

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        stopwatch.add(boundary_of(node) or site_of(node) or "", seconds)

    parts = {path: Watched(graph, see) for path, graph in converted_graphs(converted).items()}
    return with_parts(converted, parts).eval()


def _watched_modules(
    model: nn.Module, inventory: Inventory, stopwatch: Stopwatch[Key]
) -> nn.Module:
    def see(path: str, result: Any, seconds: float) -> None:
        stopwatch.add(path, seconds)

    return watched_modules(model, inventory.matches, see)


def _report(
    plan: Plan,
    floats: Mapping[Key, Timing],
    ints: Mapping[Key, Timing],
    whole: Mapping[str, Timing],
    conditions: Conditions,
) -> Profile:
    sites = [
        ProfiledSite(
            site.name,
            site.op,
            site.verdict,
            floats.get(site.name, NO_TIME),
            ints.get(site.name, NO_TIME),
        )
        for site in plan.sites
    ]
    boundaries = [
        ProfiledBoundary(key.tensor, key.direction, timing)
        for key, timing in ints.items()
        if isinstance(key, Boundary)
    ]
    return Profile(
        sites=tuple(sorted(sites, key=lambda site: -site.loss)),
        boundaries=tuple(sorted(boundaries, key=lambda each: -each.time.seconds)),
        eager=whole["eager"],
        fused=whole["fused"],
        int8=whole["int8"],
        float_rest=floats.get("", NO_TIME),
        int8_rest=ints.get("", NO_TIME),
        conditions=conditions,
        ingredients=plan.ingredients,
    )
