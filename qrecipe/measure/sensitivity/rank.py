"""Rank sites by quantizing one at a time as the recipe would, with all others in float."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ExecutionError, Finding, UnsupportedError
from qrecipe.errors.text import counted, shown
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import (
    Forward,
    inputs_of_batch,
    known_length,
    limited,
    peek,
    rereadable,
)
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.calls import calls_of
from qrecipe.execution.engine import engine
from qrecipe.execution.executors import executor_of
from qrecipe.execution.isolated import Isolated
from qrecipe.execution.part import Task
from qrecipe.measure.sensitivity.estimate import Estimate
from qrecipe.measure.sensitivity.exact import Replay, rerun
from qrecipe.measure.sensitivity.ranking import (
    Method,
    RankedSite,
    Ranking,
    contradiction,
    worst_first,
)
from qrecipe.measure.sensitivity.scores import Effect, Metric, MetricScore, Score, SqnrScore, number
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, structural_copy
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.asked import DEQUANTIZE
from qrecipe.planning.decide import plan_of, warn_of_missed
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.target_cpu import TargetCpu, unjudged_sites
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress
from qrecipe.transforms.transform import ready

Evaluate = Callable[[nn.Module], float]
"""The quality of a model; higher is better."""

DEFAULT_MEMORY_LIMIT = 2 * 2**30

_SEEDS = range(-(2**63), 2**64)


@neutral
@ranks.alone()
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
        UnsupportedError: an estimate, or roots, with ``executor = "pt2e"`` (QR316).
        ExecutionError: nothing to rank (QR422), a measure that returns no number (QR423), too
            little memory (QR424), or arguments that are invalid or contradict each other (QR425).
    """
    _check_arguments(method, evaluate, metric, forward, memory_limit, probes, seed)
    given = load_recipe(recipe)
    loaded = replace(given, phase="ptq")  # rank the loss without training, which would reduce it
    held = rereadable(batches, loaded.calibration.max_batches)
    model = ready(model, loaded, held, forward, progress)
    first, _ = peek(held)
    with inputs_of_batch(model, first, forward) as inputs:
        inventory = inventory_of(model, loaded, inputs)
    plan = plan_of(model, inventory, loaded, inputs)
    if method == "estimate" and plan.executor in DEQUANTIZE:
        message = f'executor = "{plan.executor}" ranks sites exactly, and does not estimate'
        raise UnsupportedError(Finding("QR316", message, hint='pass method="exact"'))
    unjudged = unjudged_sites(plan, target_cpu)
    reasons = unranked(inventory, plan)
    sites = [site for site in plan.sites if site.name not in reasons]
    _check_any(sites, reasons)
    warn_of_missed(plan, loaded)
    task = Task(inventory.model, loaded, inventory, plan, inputs, unjudged)
    run = partial(calibrate, batches=held, forward=forward, progress=progress)
    isolated = executor_of(plan.executor).isolated(task, sites, run)
    source = _Source(held, loaded.calibration.max_batches, forward)
    limit = DEFAULT_MEMORY_LIMIT if memory_limit is None else memory_limit
    found = _Found()
    if evaluate is not None:
        steps = _by_evaluation(found, isolated, evaluate)
    elif method == "estimate":
        steps = _by_estimate(found, source, Estimate(isolated, probes, seed, limit))
    else:
        steps = _by_scores(found, isolated, model, source, metric, limit)
    show, interrupted = chosen_progress(progress, "measuring"), False
    with engine(plan.backend), torch.no_grad(), quiet():
        try:
            for done, total in enumerate(steps, start=1):
                show(done, total)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not found.effects:
        raise KeyboardInterrupt
    if interrupted:
        text = (
            f"interrupted after {len(found.effects)} of {counted(len(sites), 'site')}, "
            f"{counted(found.batches, 'whole batch')}"
        )
        hint = "the ranking covers what was measured so far"
        warn(Finding("QR212", text, hint=hint), given.lint.ignore)
    ranked = (
        RankedSite(site.name, site.op, *found.effects[site.name])
        for site in plan.sites
        if site.name in found.effects
    )
    return Ranking(
        sites=tuple(sorted(ranked, key=worst_first)),
        unranked=FrozenMapping(reasons),
        method=method,
        batches=max(1, found.batches),
        partial=interrupted,
        float_value=found.float_value,
        recipe=given,
        members=frozenset(member for site in plan.sites for member in site.members),
    )


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
        raise ExecutionError.of(
            "QR422",
            f"the plan quantizes none of {len(reasons)} sites with a range of its own",
            hint="`qrecipe plan` shows why each stays float",
        )


@dataclass(frozen=True, slots=True)
class _Source:
    """The caller's batches, limited as in calibration; ``count`` of them if known."""

    batches: Iterable[Any]
    limit: int
    forward: Forward | None

    @property
    def count(self) -> int | None:
        return known_length(self.batches, self.limit)

    def calls(self, model: nn.Module) -> Iterator[list[Sample]]:
        """The calls of a float model for each batch."""
        for index, batch in enumerate(limited(self.batches, self.limit)):
            yield calls_of(model, batch, index, self.forward)


@dataclass(slots=True)
class _Found:
    """What is measured so far: SQNR, value and number of batches by site, and whole batches."""

    effects: dict[str, Effect] = field(default_factory=dict)
    batches: int = 0
    float_value: float | None = None


Steps = Iterator[int | None]
"""Measures, and after each step gives the number of all steps if it is known."""


def _by_scores(
    found: _Found,
    isolated: Isolated,
    model: nn.Module,
    source: _Source,
    metric: Metric | None,
    limit: int,
) -> Steps:
    new: Callable[[], Score] = SqnrScore if metric is None else partial(MetricScore, metric)
    scores, perfect, count = {name: new() for name in isolated.kernels}, new(), source.count
    outputs: Callable[[Inputs], Iterator[tuple[str, Any]]] = partial(rerun, isolated)
    if isolated.graph is not None:
        outputs = Replay(isolated.graph, isolated.kernels, limit).outputs
    # the caller's own model: fusion rounds differently, which counts where errors are small
    for calls in source.calls(runnable_copy(model)):
        for call in calls:
            if metric is not None:
                perfect.add(call.output, call.output)
                found.float_value = perfect.effect()[1]
            for name, output in outputs(call.inputs):
                scores[name].add(call.output, output)
                found.effects[name] = scores[name].effect()
                yield None if count is None else count * len(scores)
        found.batches += 1


def _by_estimate(found: _Found, source: _Source, estimate: Estimate) -> Steps:
    with estimate.probing() as probed:
        for calls in source.calls(probed):
            for call in calls:
                estimate.add(call.inputs)
            found.batches += 1
            for name, sqnr_db in estimate.sqnr_db().items():
                found.effects[name] = (sqnr_db, None, found.batches)
            yield source.count


def _by_evaluation(found: _Found, isolated: Isolated, evaluate: Evaluate) -> Steps:
    def value() -> float:
        candidate = structural_copy(isolated.float_model)
        return number(partial(evaluate, candidate), "evaluate")

    steps = len(isolated.sites) + 1
    found.batches, found.float_value = 1, value()
    yield steps
    for lone in isolated.sites:
        with lone.replaced(isolated.kernels[lone.site.name]):
            found.effects[lone.site.name] = (None, value(), 1)
        yield steps


def _check_arguments(
    method: Method,
    evaluate: Evaluate | None,
    metric: Metric | None,
    forward: Forward | None,
    memory_limit: int | None,
    probes: int,
    seed: int,
) -> None:
    for name, function in (("evaluate", evaluate), ("metric", metric), ("forward", forward)):
        if function is not None and not callable(function):
            raise contradiction(f"{name} must be a function, not {shown(type(function).__name__)}")
    for name, integer in (("probes", probes), ("seed", seed)):
        if not isinstance(integer, Integral):
            raise contradiction(f"{name} must be an integer, not {shown(type(integer).__name__)}")
    for is_wrong, message in (
        (
            method not in ("exact", "estimate"),
            f'method must be "exact" or "estimate", not {method!r}',
        ),
        (
            evaluate is not None and metric is not None,
            "evaluate and metric both rank: pass one of them",
        ),
        (
            method == "estimate" and (evaluate is not None or metric is not None),
            "an estimate ranks by SQNR: evaluate and metric need the exact method",
        ),
        (
            memory_limit is not None and not (isinstance(memory_limit, Real) and memory_limit > 0),
            f"memory_limit is {shown(memory_limit)}, not a number of bytes",
        ),
        (probes < 1, f"probes is {probes}: at least one is needed"),
        (seed not in _SEEDS, f"seed is {seed}: torch's seeds have 64 bits"),
    ):
        if is_wrong:
            raise contradiction(message)
