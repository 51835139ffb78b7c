"""Rank sites by quantizing one at a time as the recipe would, with all others in float."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.errors.findings import ExecutionError, Finding
from qrecipe.errors.text import counted, shown
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import Forward, inputs_of_batch, known_length, limited, peek
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.engine import engine
from qrecipe.execution.executors import executor_of
from qrecipe.execution.isolated import Isolated
from qrecipe.execution.part import Task
from qrecipe.measure.batches import Call, calls_of, rereadable
from qrecipe.measure.sensitivity.estimate import Estimate
from qrecipe.measure.sensitivity.exact import Replay, Rerun
from qrecipe.measure.sensitivity.ranking import (
    Method,
    RankedSite,
    Ranking,
    contradiction,
    worst_first,
)
from qrecipe.measure.sensitivity.scores import Metric, MetricScore, Score, SqnrScore, number
from qrecipe.model.copies import runnable_copy, structural_copy
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.decide import plan_of, warn_of_missed
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.target_cpu import TargetCpu, unjudged_sites
from qrecipe.process.neutral import neutral
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress

Evaluate = Callable[[nn.Module], float]
"""The quality of a model; higher is better."""

DEFAULT_MEMORY_LIMIT = 2 * 2**30

_SEEDS = range(-(2**63), 2**64)


@neutral
def sensitivity(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    method: Method = "exact",
    evaluate: Evaluate | None = None,
    metric: Metric | None = None,
    forward: Forward | None = None,
    memory_limit: int | None = None,
    probes: int = 1,
    seed: int = 0,
    progress: Progress | bool | None = None,
    target_cpu: TargetCpu = "this",
) -> Ranking:
    """Rank the sites by their effect on the output when only that site is quantized.

    Each site is quantized as the recipe says, with all others in float, and the output is compared
    with the float model's: 20 log10(|x| / |x - y|), with norms over all batches.

    Args:
        batches: as in `qrecipe.calibrate`; used both to calibrate and to measure.
        method: ``"exact"`` runs the rest of the model for each site; ``"estimate"`` projects the
            errors of all sites on ``probes`` random directions, drawn from ``seed``.
        evaluate: rank by ``evaluate(model) -> float`` instead, called once per site; higher is
            better.
        metric: rank by ``metric(outputs, reference) -> float`` instead, called per site and batch
            with outputs of the model; higher is better.
        memory_limit: how many bytes of float activations may be kept; default: 2 GiB.
        target_cpu: as for `qrecipe.compile`; kernels that only saturate on this CPU are ranked by
            their reference.

    An interrupt (``KeyboardInterrupt``) returns what was measured so far with a warning (QR212).

    Raises:
        RecipeError, PlanError, CalibrationError: as `qrecipe.quantize`.
        ExecutionError: nothing to rank (QR422), a measure that returns no number (QR423), too
            little memory (QR424), or arguments that are invalid or contradict each other (QR425).
    """
    _check_functions(evaluate=evaluate, metric=metric, forward=forward)
    _check_integers(probes=probes, seed=seed)
    _check_arguments(method, evaluate, metric, memory_limit, probes, seed)
    given = load_recipe(recipe)
    loaded = replace(given, phase="ptq")  # rank the loss without training, which would reduce it
    held = rereadable(batches, loaded.calibration.max_batches)
    first, _ = peek(held)
    with inputs_of_batch(model, first, forward) as inputs:
        inventory = inventory_of(model, loaded, inputs)
    plan = plan_of(model, inventory, loaded, inputs)
    unjudged = unjudged_sites(plan, target_cpu)
    reasons = unranked(inventory, plan)
    sites = [site for site in plan.sites if site.name not in reasons]
    _check_any(sites, reasons)
    warn_of_missed(plan, loaded)
    task = Task(model, loaded, inventory, plan, inputs, unjudged)
    run = partial(calibrate, batches=held, forward=forward, progress=progress)
    isolated = executor_of(plan.executor).isolated(task, sites, run)
    most = loaded.calibration.max_batches
    source = _Source(held, most, forward)
    show = _Show(chosen_progress(progress, "measuring"), len(sites), held, most)
    limit = DEFAULT_MEMORY_LIMIT if memory_limit is None else memory_limit
    with engine(plan.backend), torch.no_grad(), quiet():
        if evaluate is not None:
            found = _by_evaluation(isolated, evaluate, show)
        elif method == "estimate":
            estimate = Estimate(isolated, probes, seed, limit)
            found = _by_estimate(model, source, estimate, show)
        else:
            found = _by_scores(isolated, model, source, metric, limit, show)
    return _ranking(found, plan, reasons, method, given)


def unranked(inventory: Inventory, plan: Plan) -> dict[str, str]:
    """The sites that cannot be quantized alone, and why."""
    found: dict[str, str] = {}
    for site in plan.sites:
        if site.verdict == "float":
            found[site.name] = "stays float"
        elif site.verdict == "passthrough":
            found[site.name] = f"{site.reason}: alone it would stay float"
        elif inventory.matches[site.name].operation.kind == "fixed_qparams":
            found[site.name] = "its range is fixed and its producer float: alone it stays float"
    return found


def _check_any(sites: Sequence[Site], reasons: Mapping[str, str]) -> None:
    """Raises ``ExecutionError`` (QR422) if there is no site to rank."""
    if not sites:
        raise ExecutionError(
            Finding(
                "QR422",
                f"the plan quantizes none of {len(reasons)} sites with a range of its own",
                hint="`qrecipe plan` shows why each stays float",
            )
        )


@dataclass(frozen=True, slots=True)
class _Source:
    """The caller's batches, limited as in calibration, and how to run a model on one."""

    batches: Iterable[Any]
    limit: int
    forward: Forward | None

    def calls(self, model: nn.Module) -> Iterator[list[Call]]:
        """The calls of the model for each batch."""
        for index, batch in enumerate(limited(self.batches, self.limit)):
            yield calls_of(model, batch, index, self.forward)


@dataclass(frozen=True, slots=True)
class _Found:
    """The measurements of each site: SQNR and value, and the number of batches."""

    effects: Mapping[str, tuple[float | None, float | None, int]]
    interrupted: bool
    batches: int
    float_value: float | None = None


class _Show:
    """Progress in steps of one site on one batch."""

    def __init__(self, progress: Progress, sites: int, batches: Iterable[Any], most: int) -> None:
        self._progress = progress
        self._done = 0
        self._sites = sites
        self._count = known_length(batches, most)

    def site(self) -> None:
        self._step(None if self._count is None else self._count * self._sites)

    def batch(self) -> None:
        self._step(self._count)

    def model(self) -> None:
        self._step(self._sites + 1)

    def _step(self, total: int | None) -> None:
        self._done += 1
        self._progress(self._done, total)


def _by_scores(
    isolated: Isolated,
    model: nn.Module,
    source: _Source,
    metric: Metric | None,
    limit: int,
    show: _Show,
) -> _Found:
    scores: dict[str, Score] = {
        name: SqnrScore() if metric is None else MetricScore(metric) for name in isolated.kernels
    }
    perfect = None if metric is None else MetricScore(metric)
    runner: Replay | Rerun = Rerun(isolated)
    if isolated.graph is not None:
        runner = Replay(isolated.graph, isolated.kernels, limit)
    reference, count, interrupted = runnable_copy(model), 0, False
    try:
        for calls in source.calls(reference):
            for call in calls:
                if perfect is not None:
                    perfect.add(call.output, call.output)
                runner.add(call, scores, show.site)
            count += 1
    except KeyboardInterrupt:
        interrupted = True
    effects = {
        name: (score.sqnr_db, score.value, score.batches)
        for name, score in scores.items()
        if score.batches
    }
    return _Found(effects, interrupted, count, None if perfect is None else perfect.value)


def _by_estimate(model: nn.Module, source: _Source, estimate: Estimate, show: _Show) -> _Found:
    reference, interrupted = runnable_copy(model), False
    try:
        for calls in source.calls(reference):
            for call in calls:
                estimate.add(call)
            show.batch()
    except KeyboardInterrupt:
        interrupted = True
    count = estimate.batches
    values = estimate.sqnr_db() if count else {}
    return _Found({name: (v, None, count) for name, v in values.items()}, interrupted, count)


def _by_evaluation(isolated: Isolated, evaluate: Evaluate, show: _Show) -> _Found:
    effects: dict[str, tuple[float | None, float | None, int]] = {}
    interrupted, base = False, None
    try:
        untouched = structural_copy(isolated.float_model)
        base = number(partial(evaluate, untouched), "evaluate")
        show.model()
        for lone in isolated.sites:
            name = lone.site.name
            lone.put(isolated.kernels[name])
            candidate = structural_copy(isolated.float_model)
            lone.put(lone.original)
            effects[name] = (None, number(partial(evaluate, candidate), "evaluate"), 1)
            show.model()
    except KeyboardInterrupt:
        interrupted = True
    return _Found(effects, interrupted, 1, base)


def _ranking(
    found: _Found, plan: Plan, reasons: Mapping[str, str], method: Method, recipe: Recipe
) -> Ranking:
    if found.interrupted:
        if not found.effects:
            raise KeyboardInterrupt
        count = len(plan.sites) - len(reasons)
        batches = counted(found.batches, "whole batch")
        done = f"{len(found.effects)} of {counted(count, 'site')}, {batches}"
        finding = Finding(
            "QR212", f"interrupted after {done}", hint="the ranking covers what was measured so far"
        )
        warn(finding, recipe.lint.ignore)
    ranked = [
        RankedSite(site.name, site.op, *found.effects[site.name])
        for site in plan.sites
        if site.name in found.effects
    ]
    return Ranking(
        sites=tuple(sorted(ranked, key=worst_first)),
        unranked=FrozenMapping(reasons),
        method=method,
        batches=max(1, found.batches),
        partial=found.interrupted,
        float_value=found.float_value,
        recipe=recipe,
        members=frozenset(member for site in plan.sites for member in site.members),
    )


def _check_arguments(
    method: Method,
    evaluate: Evaluate | None,
    metric: Metric | None,
    memory_limit: int | None,
    probes: int,
    seed: int,
) -> None:
    if method not in ("exact", "estimate"):
        raise contradiction(f'method must be "exact" or "estimate", not {method!r}')
    if evaluate is not None and metric is not None:
        raise contradiction("evaluate and metric both rank: pass one of them")
    if method == "estimate" and (evaluate is not None or metric is not None):
        raise contradiction("an estimate ranks by SQNR: evaluate and metric need the exact method")
    if memory_limit is not None and not (isinstance(memory_limit, Real) and memory_limit > 0):
        raise contradiction(f"memory_limit is {shown(memory_limit)}, not a number of bytes")
    if probes < 1:
        raise contradiction(f"probes is {probes}: at least one is needed")
    if seed not in _SEEDS:
        raise contradiction(f"seed is {seed}: torch's seeds have 64 bits")


def _check_functions(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not callable(value):
            raise contradiction(f"{name} must be a function, not {shown(type(value).__name__)}")


def _check_integers(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Integral):
            raise contradiction(f"{name} must be an integer, not {shown(type(value).__name__)}")
