"""Search for the fastest recipe within an accuracy budget."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from torch import nn

from qrecipe.authoring.tune.ahead import Ahead
from qrecipe.authoring.tune.levers import levers_of
from qrecipe.authoring.tune.log import TrialLog, open_log, search_owner
from qrecipe.authoring.tune.result import TuningResult, found
from qrecipe.authoring.tune.search import Search
from qrecipe.authoring.tune.trials import ModelBench, Stop, Stopped
from qrecipe.authoring.tune.trying import Trying, accuracy
from qrecipe.errors.findings import ExecutionError, Finding
from qrecipe.errors.text import counted, shown
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import (
    Forward,
    inputs_of_batch,
    limited,
    peek,
    rereadable,
    steady_digest,
)
from qrecipe.measure.sensitivity.steps import Evaluate
from qrecipe.model.copies import runnable_copy
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.backend import can_honour
from qrecipe.planning.decide import plan_of
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu, unjudged_sites
from qrecipe.pool.crew import crew_for
from qrecipe.pool.workers import Pool
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress
from qrecipe.transforms.transform import ready

_ROUNDING = 1e-9
"""How much of a metric is rounding: 0.986 - 0.01 is a little more than 0.976."""


@neutral
@ranks.alone()
def tune(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    max_drop: float = 0.01,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
    target_cpu: TargetCpu = "this",
    pool: Executor | Pool | None = None,
) -> TuningResult:
    """Search for a recipe that loses at most ``max_drop`` and is as fast as possible here.

    Levers, changes of the recipe that cost no time, are tried first. Then sites are left float,
    weighing the error that this removes against the time that it costs. The result has been
    measured, and twice if it was chosen from several.

    Args:
        recipe: the recipe to start from; the result extends it.
        batches: as in `qrecipe.calibrate`; used to calibrate and to rank the sites.
        evaluate: ``evaluate(model) -> float``, higher is better; called once per trial.
        max_drop: how much of the float model's metric may be lost, in the metric's units.
        max_trials: the maximum number of trials, including those of a resumed search.
        max_seconds: no trial is started after that; a running one is finished.
        target_cpu: as for `qrecipe.compile`; trials are evaluated as they compute on that CPU.
        resume: a log that is written after each trial; if it exists, the search resumes from it.
            The batches are read once or twice more for it.
        pool: workers that try candidates, any ``concurrent.futures.Executor``, some of them before
            the search asks for them. The trials are the same, except for measured times. See
            `qrecipe.Pool`.

    An interrupt (``KeyboardInterrupt``) returns the best result so far with a warning (QR218). A
    budget that was not met is also a warning (QR219).

    Raises:
        RecipeError, PlanError, CalibrationError: as `qrecipe.quantize`, for the unchanged recipe.
        ExecutionError: ``evaluate`` returns no number for the float model or for all trials so far
            (QR423, QR330), the log cannot be used (QR331, QR332), the limits are invalid
            (QR333), or the workers fail (QR425 to QR428).
    """
    _check_bounds(max_drop, max_trials, max_seconds)
    base = load_recipe(recipe)
    held = rereadable(batches, base.calibration.max_batches)
    given, model = model, ready(model, base, held, forward, progress)
    inventory, planned = _planned(model, base, held, forward)
    unjudged_sites(planned, target_cpu)  # before anything is measured
    started = time.monotonic()
    read = "" if resume is None else steady_digest(held, base.calibration.max_batches)
    log = open_log(resume, search_owner(base, given, target_cpu, read))
    show = chosen_progress(progress, "tuning")
    trying = Trying(model, base, evaluate, forward, target_cpu)
    float_metric = _float_metric(model, evaluate, log)
    least = float_metric - max_drop
    target = least - _ROUNDING * max(1.0, abs(least))
    levers = levers_of(base, planned, target_cpu)
    with _ahead(trying, held, log, pool) as ahead:
        bench = ModelBench(
            trying,
            held,
            show,
            planned.members,
            log,
            max_trials=math.inf if max_trials is None else max_trials,
            end=math.inf if max_seconds is None else started + max_seconds,
            begin=lambda guessing: Search(guessing, levers, target, lambda trial: None),
            ahead=ahead,
        )
        search = Search(bench, levers, target, bench.record)
        stopped = _run(search)
    if len(search.trials) != max_trials:  # else that was shown as the last
        show(len(search.trials), len(search.trials))
    left = _left_float(base, inventory, planned)
    result = found(base, search, float_metric, max_drop, planned, left, stopped)
    _warn(result, base)
    return result


@contextmanager
def _ahead(
    trying: Trying, batches: Iterable[Any], log: TrialLog, pool: Executor | Pool | None
) -> Iterator[Ahead | None]:
    """What tries candidates on the workers, if there are any, inside the ``with``."""
    if pool is None:
        yield None
        return
    given = limited(batches, trying.recipe.calibration.max_batches)
    with crew_for(trying, given, pool) as crew:
        yield Ahead(crew, log)


def _run(search: Search) -> Stop | None:
    try:
        search.run()
    except Stopped as stop:
        return stop.why
    except KeyboardInterrupt:
        if not search.trials:
            raise
        return "interrupt"
    return None


def _planned(
    model: nn.Module, recipe: Recipe, batches: Iterable[Any], forward: Forward | None
) -> tuple[Inventory, Plan]:
    first, _ = peek(batches)
    calibrated = replace(recipe, phase="ptq")
    # quantizing warns again
    with unwarned(), inputs_of_batch(model, first, forward) as inputs:
        inventory = inventory_of(model, calibrated, inputs)
        return inventory, plan_of(inventory, calibrated, inputs)


def _left_float(recipe: Recipe, inventory: Inventory, planned: Plan) -> tuple[str, ...]:
    """The sites that a rule of the recipe leaves float although they have a kernel."""
    qconfigs = {rule.qconfig for rule in recipe.rules if rule.qconfig is not None}
    return tuple(
        site.name
        for site in planned.sites
        if site.verdict == "float"
        and site.rule.is_float
        and any(
            can_honour(inventory, [site.name], qconfig, recipe.backend, "ptq", planned.executor)
            for qconfig in qconfigs
        )
    )


def _float_metric(model: nn.Module, evaluate: Evaluate, log: TrialLog) -> float:
    if log.float_metric is not None:
        return log.float_metric
    metric = accuracy(evaluate, runnable_copy(model))
    if not math.isfinite(metric):
        raise ExecutionError.of(
            "QR330",
            "evaluate returns no finite number for the float model",
            hint="return the quality of the model as a float; higher is better",
        )
    log.note_float(metric)
    return metric


def _check_bounds(max_drop: Any, max_trials: Any, max_seconds: Any) -> None:
    holds = {
        f"max_drop is {shown(max_drop)}: it must be a finite number, 0 or more": (
            _is_a(Real, max_drop) and 0 <= max_drop < math.inf
        ),
        f"max_trials is {shown(max_trials)}: it must be an integer, 1 or more": (
            max_trials is None or (_is_a(Integral, max_trials) and max_trials >= 1)
        ),
        f"max_seconds is {shown(max_seconds)}: it must be a number above 0": (
            max_seconds is None or (_is_a(Real, max_seconds) and max_seconds > 0)
        ),
    }
    problems = [Finding("QR333", text) for text, is_met in holds.items() if not is_met]
    if problems:
        raise ExecutionError(problems)


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _warn(result: TuningResult, base: Recipe) -> None:
    if result.stopped == "interrupt":
        met = "was met" if result.reached else "was not met yet"
        text = f"interrupted after {counted(len(result.trials), 'trial')}; the budget {met}"
        warn(Finding("QR218", text, hint="the recipe is the best so far"), base.lint.ignore)
    elif not result.reached:
        distance = "" if result.distance is None else f" by {result.distance:.4g}"
        warn(
            Finding(
                "QR219",
                f"the best recipe of {counted(len(result.trials), 'trial')} misses the "
                f"budget{distance}",
                hint='training can recover more than calibration: phase = "qat"',
            ),
            base.lint.ignore,
        )
