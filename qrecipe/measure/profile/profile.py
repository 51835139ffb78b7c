"""Profile a model: each site as float and as int8, and each boundary, in the shapes it has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.execution.batches import Forward, describe_batch, inputs_of_batch, peek, rereadable
from qrecipe.execution.calls import calls_of
from qrecipe.execution.engine import check_engine, engine_of
from qrecipe.execution.provenance import provenance, stored_plan
from qrecipe.measure.profile.passes import (
    Boundary,
    conversion_pass,
    float_pass,
    in_channels_last,
    int8_pass,
)
from qrecipe.measure.profile.report import Conditions, Profile, ProfiledBoundary, ProfiledSite
from qrecipe.measure.turns import NO_TIME, Pass, Timing, run_in_turn
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.pipeline import quantize
from qrecipe.planning.cpu import cpu_name
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress
from qrecipe.transforms.transform import ready

ROUNDS = 15


@neutral
@ranks.alone()
def profile(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Profile:
    """Measure the time of each site, as float and as int8, and of each boundary between them.

    The model is quantized. Then it runs on the first batch in passes, round after round: all sites
    in float, also with images in channels_last, all sites in int8, the conversions of all results,
    and each model as a whole. So each site is timed between its neighbours, in the shapes and
    layouts that it has there. Times are wall time with torch's current number of threads, and CPU
    time if that is one.

    Args:
        batches: as in `qrecipe.calibrate`.

    Raises what `qrecipe.quantize` raises, and ``UnsupportedError`` (QR309) for a backend whose
    models are exported and not run here.
    """
    return measured(bench_of(model, recipe, batches, forward, progress), progress)


@dataclass(frozen=True, slots=True)
class Bench:
    """A model and what it was converted to, with the calls that the first batch leads to.

    ``eager`` is a copy of the caller's model, ``held`` are the batches, which can be read again.
    """

    eager: nn.Module
    converted: nn.Module
    inventory: Inventory
    plan: Plan
    held: Iterable[Any]
    batch: Any
    calls: Sequence[Inputs]


def bench_of(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    forward: Forward | None,
    progress: Progress | bool | None,
    target_cpu: TargetCpu = "this",
) -> Bench:
    """The model quantized and ready to be timed.

    Raises what `qrecipe.quantize` raises, and ``UnsupportedError`` (QR309) for a backend without
    kernels in torch.
    """
    loaded = replace(load_recipe(recipe), phase="ptq")  # training changes no kernel
    check_engine(loaded.backend)
    held = rereadable(batches, loaded.calibration.max_batches)
    model = ready(model, loaded, held, forward, progress)
    converted = quantize(
        model, loaded, held, forward=forward, progress=progress, target_cpu=target_cpu
    )
    first, _ = peek(held)
    with unwarned(), inputs_of_batch(model, first, forward) as inputs:
        inventory = inventory_of(model, loaded, inputs)
    eager = runnable_copy(model)
    calls = [call.inputs for call in calls_of(eager, first, 0, forward)]
    plan = stored_plan(provenance(converted))
    return Bench(eager, converted, inventory, plan, held, first, calls)


def measured(bench: Bench, progress: Progress | bool | None) -> Profile:
    """The profile of a model that is quantized already."""
    inventory, converted, calls = bench.inventory, bench.converted, bench.calls
    graphs = {part.path: part.graph_module for part in inventory.parts}
    fused = with_parts(inventory.model, graphs).eval()
    with engine_of(bench.plan), torch.no_grad(), quiet():
        passes = {
            "float": float_pass(inventory, calls),
            "channels_last": float_pass(inventory, in_channels_last(fused, calls)),
            "int8": int8_pass(inventory, converted, calls),
            "conversions": conversion_pass(converted, calls),
            "eager": Pass.of(bench.eager, calls),
            "fused": Pass.of(fused, calls),
            "converted": Pass.of(converted, calls),
        }
        show = chosen_progress(progress, "profiling")
        run_in_turn(list(passes.values()), ROUNDS, show=show)
    threads, version = torch.get_num_threads(), str(torch.__version__)
    conditions = Conditions(cpu_name(), threads, describe_batch(bench.batch), version, ROUNDS)
    return _report(bench.plan, passes, conditions)


def _report(plan: Plan, passes: Mapping[str, Pass], conditions: Conditions) -> Profile:
    times = {name: each.parts.timings() for name, each in passes.items()}
    whole = {name: Timing.of(each.whole) for name, each in passes.items()}
    floats, ints, conversions = times["float"], times["int8"], times["conversions"]
    sites = [
        ProfiledSite(
            name=site.name,
            op=site.op,
            verdict=site.verdict,
            float_time=floats.get(site.name, NO_TIME),
            channels_last_time=times["channels_last"].get(site.name, NO_TIME),
            int8_time=ints.get(site.name, NO_TIME),
            quantize_time=conversions.get(Boundary("quantize", site.name), NO_TIME),
            dequantize_time=conversions.get(Boundary("dequantize", site.name), NO_TIME),
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
        int8=whole["converted"],
        float_rest=floats.get("", NO_TIME),
        int8_rest=ints.get("", NO_TIME),
        conditions=conditions,
        ingredients=plan.ingredients,
    )
