"""Rank sites by quantizing one at a time as the recipe would, with all others in float."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.errors.findings import ExecutionError, Finding, UnsupportedError
from qrecipe.errors.text import counted, shown
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import Forward, rereadable
from qrecipe.execution.calls import Feed
from qrecipe.execution.engine import engine
from qrecipe.measure.sensitivity.estimate import Estimate
from qrecipe.measure.sensitivity.ranking import (
    Method,
    RankedSite,
    Ranking,
    contradiction,
    worst_first,
)
from qrecipe.measure.sensitivity.scores import Metric, ranking_log
from qrecipe.measure.sensitivity.steps import (
    Evaluate,
    Found,
    RankWork,
    by_estimate,
    by_evaluation,
    by_scores,
    on_workers,
    subject_of,
)
from qrecipe.planning.asked import DEQUANTIZE
from qrecipe.planning.decide import warn_of_missed
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.pool.workers import Pool
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.runtimes.table import known_session
from qrecipe.terminal.progress import Progress, chosen_progress
from qrecipe.transforms.transform import ready

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
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    target_cpu: TargetCpu = "this",
    pool: Executor | Pool | None = None,
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
        resume: a log of the exact method that is written after each site and batch; if it exists,
            the ranking continues from there.
        target_cpu: as for `qrecipe.compile`; kernels that only saturate on this CPU are ranked by
            their reference.
        pool: workers that run the exact method in pieces, any ``concurrent.futures.Executor``; the
            ranking is bit-identical. See `qrecipe.Pool`.

    An interrupt (``KeyboardInterrupt``) returns what was measured so far with a warning (QR212).

    Raises:
        RecipeError, PlanError, CalibrationError: as `qrecipe.quantize`.
        UnsupportedError: an estimate, or roots, with ``executor = "pt2e"`` (QR316).
        ExecutionError: nothing to rank (QR422), a measure that returns no number (QR423), too
            little memory (QR424), arguments that are invalid or contradict each other (QR425),
            workers that fail (QR426, QR427, QR428), or a log of other work, or one that cannot be
            used (QR331, QR332).
    """
    functions = {"evaluate": evaluate, "metric": metric, "forward": forward}
    of_exact = {"pool": pool, "resume": resume}
    _check_arguments(method, functions, of_exact, memory_limit, probes, seed)
    base = _recipe(recipe)
    loaded = replace(base, phase="ptq")  # rank the loss without training, which would reduce it
    most = loaded.calibration.max_batches
    held = rereadable(batches, most)
    feed = Feed(held, forward, most)
    original, model = model, ready(model, loaded, held, forward, progress)
    limit = DEFAULT_MEMORY_LIMIT if memory_limit is None else memory_limit
    work = RankWork(model, loaded, evaluate, metric, forward, limit, target_cpu)
    subject = subject_of(work, held)
    plan, names = subject.plan, [site.name for site in subject.sites]
    if method == "estimate" and plan.executor in DEQUANTIZE:
        message = f'executor = "{plan.executor}" ranks sites exactly, and does not estimate'
        raise UnsupportedError(Finding("QR316", message, hint='pass method="exact"'))
    warn_of_missed(plan, loaded)
    log = ranking_log(resume, plan, original, iter(feed), functions, target_cpu)
    found = Found()
    if pool is not None:
        steps = on_workers(found, work, names, iter(feed), pool, log)
    else:
        isolated = subject.isolated(held, progress)
        if evaluate is not None:
            steps = by_evaluation(found, isolated, evaluate, log)
        elif method == "estimate":
            steps = by_estimate(found, feed, Estimate(isolated, probes, seed, limit))
        else:
            steps = by_scores(found, work, isolated, names, feed, log)
    show, interrupted = chosen_progress(progress, "measuring"), False
    # the workers have an engine of their own, even where they are threads
    with nullcontext() if pool is not None else _computing(plan), closing(steps):
        try:
            for done, total in enumerate(steps, start=1):
                show(done, total)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not found.effects:
        raise KeyboardInterrupt
    if interrupted:
        text = f"interrupted after {len(found.effects)} of {counted(len(names), 'site')}"
        if evaluate is None:
            text = f"{text}, {counted(found.batches, 'whole batch')}"
        hint = "the ranking covers what was measured so far"
        warn(Finding("QR212", text, hint=hint), base.lint.ignore)
    ranked = (
        RankedSite(site.name, site.op, *found.effects[site.name])
        for site in plan.sites
        if site.name in found.effects
    )
    return Ranking(
        sites=tuple(sorted(ranked, key=worst_first)),
        unranked=FrozenMapping(subject.reasons),
        method=method,
        batches=max(1, found.batches),
        partial=interrupted,
        float_value=found.float_value,
        recipe=base,
        members=plan.members,
        by_evaluation=evaluate is not None,
    )


@contextmanager
def _computing(plan: Plan) -> Iterator[None]:
    with engine(plan.backend), torch.no_grad(), quiet():
        yield


def _check_arguments(
    method: Method,
    functions: Mapping[str, Callable[..., Any] | None],
    of_exact: Mapping[str, object],
    memory_limit: int | None,
    probes: int,
    seed: int,
) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise contradiction(f"{name} must be a function, not {shown(type(function).__name__)}")
    for name, integer in (("probes", probes), ("seed", seed)):
        if not isinstance(integer, Integral):
            raise contradiction(f"{name} must be an integer, not {shown(type(integer).__name__)}")
    measures = [functions[name] for name in ("evaluate", "metric") if functions[name] is not None]
    is_limit = isinstance(memory_limit, Real) and memory_limit > 0
    is_estimate = method == "estimate"
    problems = {
        f'method must be "exact" or "estimate", not {method!r}': method not in get_args(Method),
        "evaluate and metric both rank: pass one of them": len(measures) > 1,
        "an estimate ranks by SQNR: evaluate and metric need the exact method": (
            is_estimate and len(measures) > 0
        ),
        f"memory_limit is {shown(memory_limit)}, not a number of bytes": (
            memory_limit is not None and not is_limit
        ),
        f"probes is {probes}: at least one is needed": probes < 1,
        f"seed is {seed}: torch's seeds have 64 bits": seed not in _SEEDS,
    }
    for name, given in of_exact.items():
        text = f"an estimate is a single pass: {name} needs the exact method"
        problems[text] = is_estimate and given is not None
    for message, is_wrong in problems.items():
        if is_wrong:
            raise contradiction(message)


def _recipe(given: Recipe | str | os.PathLike[str]) -> Recipe:
    """Raises ``ExecutionError`` (QR422) for a session, which `compare` takes in this place."""
    if known_session(given) is not None:
        kind = type(given).__name__
        text = f"this {kind} only returns outputs: no site of it can be quantized by itself"
        hint = "pass the float model and the recipe of its file; compare takes a session"
        raise ExecutionError.of("QR422", text, hint=hint)
    return load_recipe(given)
