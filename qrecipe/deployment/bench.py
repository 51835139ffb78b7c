"""One recipe through every runtime that is installed: which is the fastest, and is it right."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.deployment.job import Job
from qrecipe.deployment.result import PLACEHOLDERS, Bench, BenchRow
from qrecipe.deployment.verdict import distances, verdict_of, verdict_of_float
from qrecipe.deployment.ways import WAYS, Made, Way, commands
from qrecipe.errors.findings import AuditError, ExecutionError, QRecipeError
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import first_line, shown, shown_names
from qrecipe.execution.batches import Forward, describe_batch
from qrecipe.measure.owner import name_of
from qrecipe.measure.profile.report import Conditions
from qrecipe.measure.sensitivity.scores import number
from qrecipe.measure.sensitivity.steps import Evaluate
from qrecipe.measure.turns import Pass, Seconds, Speed, Timing, run_in_turn
from qrecipe.model.call import Inputs
from qrecipe.planning.cpu import cpu_name
from qrecipe.process import ranks
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.neutral import neutral
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.runtimes.session import Session
from qrecipe.runtimes.table import RUNTIMES, Name
from qrecipe.terminal.progress import Progress, chosen_progress

_LEAST_ROUNDS = 7
_MOST_ROUNDS = 30
_BUDGET = 20.0
"""Seconds to spend beyond the least number of rounds."""


@neutral
@ranks.alone()
def bench(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    evaluate: Evaluate | None = None,
    batch_size: int | None = None,
    threads: int = 1,
    runtimes: Collection[Name] | None = None,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
    arguments: str = PLACEHOLDERS,
) -> Bench:
    """Run the recipe in every runtime that is installed, each in float and in int8.

    Each output is held to the reference of the recipe's plan: `Bench.check` raises an error for
    those that compute something else. All take turns on the first batch, or on ``batch_size``
    samples of it; times are CPU time with one thread, and wall time with more. What fails is a row
    that says why. Neither the model nor torch's number of threads is changed.

    Args:
        batches: as in `qrecipe.calibrate`.
        evaluate: the quality of a model, called for each row. Batches of other sizes are run in
            steps.
        runtimes: some of torch, inductor, executorch, onnxruntime and openvino; all by default.
            torch's float model always runs, to compare with.
        arguments: what stands for recipe, model and data in the commands of the result.

    Raises:
        ExecutionError: arguments do not fit (QR425), or ``evaluate`` gives no number for the float
            model (QR423).
        QRecipeError: what `qrecipe.quantize` raises when it plans and calibrates.
    """
    loaded = load_recipe(recipe)
    present, missing = _present(_chosen(runtimes))
    show = chosen_progress(progress, "benchmarking")
    with TemporaryDirectory() as folder:
        calibrated = replace(loaded, phase="ptq")  # training changes no kernel
        job = Job.of(model, calibrated, batches, forward, batch_size, Path(folder))
        own = job.planned(job.recipe).compiled
        rows, times = _measured(present, job, threads, evaluate, show)
    fastest = _fastest(rows)
    conditions = Conditions(
        *(cpu_name(), threads, describe_batch(job.timed.batch), str(torch.__version__)),
        rounds=len(times[WAYS[0].title]),
    )
    return Bench(
        rows=rows,
        missing=missing,
        fastest=fastest,
        fastest_int8=_fastest([row for row in rows if row.precision == "int8"]),
        as_fast=tuple(_as_fast(fastest, rows, times)),
        commands=commands(arguments, loaded, is_for_vnni=bool(own.unjudged)),
        metric=None if evaluate is None else name_of(evaluate),
        conditions=conditions,
        clock="CPU time" if threads == 1 else "Wall time",
        ingredients=own.plan.ingredients,
    )


def _measured(
    ways: Sequence[Way], job: Job, threads: int, evaluate: Evaluate | None, show: Progress
) -> tuple[tuple[BenchRow, ...], Mapping[str, Seconds]]:
    """The rows, and the seconds of those that run, by title."""
    rows, sessions = list[BenchRow](), dict[str, Session]()
    with ExitStack() as stack:
        for name in {way.runtime for way in ways}:
            stack.enter_context(RUNTIMES[name].limited(threads))
        for done, way in enumerate(ways):
            show(done, len(ways) + 1)
            row, session = _tried(way, job, threads, evaluate)
            rows.append(row)
            if session is not None:
                sessions[row.title] = session
        times = race(sessions, job.timed, threads)
        show(len(ways) + 1, len(ways) + 1)
    return tuple(_with_times(row, times) for row in rows), times


def _chosen(runtimes: Collection[Name] | None) -> Collection[Name]:
    known = get_args(Name)
    for name in () if runtimes is None else runtimes:
        if name not in known:
            text = f"there is no runtime {shown(name)}: choose from {shown_names(known)}"
            raise ExecutionError.of("QR425", text, hint=did_you_mean(str(name), known))
    return known if runtimes is None else runtimes


def _present(chosen: Collection[Name]) -> tuple[list[Way], tuple[str, ...]]:
    """The ways whose runtimes are installed, and a line for each that is not."""
    why = {name: _why_missing(name) for name in chosen}
    there = {"torch", *(name for name, text in why.items() if text is None)}
    ways = [way for way in WAYS if way.runtime in there and (way.runtime in why or way is WAYS[0])]
    return ways, tuple(text for text in why.values() if text is not None)


def _why_missing(name: Name) -> str | None:
    try:
        RUNTIMES[name].check()
    except QRecipeError as error:
        return f"Not installed: {error.findings[0].message}"
    return None


def _tried(
    way: Way, job: Job, threads: int, evaluate: Evaluate | None
) -> tuple[BenchRow, Session | None]:
    """A row without times, and its session, if that runs.

    Raises whatever torch's float model raises.
    """
    row = BenchRow(way.runtime, way.precision)
    try:
        with held_back([("", Warning)]), quiet():
            made = way.make(job, threads)
            return _judged(row, job, made, evaluate), made.session
    except AuditError as error:
        return replace(row, findings=tuple(error.findings)), None
    except Exception as error:
        raise_lack_of_memory(error)
        if way is WAYS[0]:
            raise
        return replace(row, failure=_reason(error)), None


def _reason(error: Exception) -> str:
    if not isinstance(error, QRecipeError):
        return first_line(error)
    finding = error.findings[0]
    return finding.message if finding.hint is None else f"{finding.message} ({finding.hint})"


def _judged(row: BenchRow, job: Job, made: Made, evaluate: Evaluate | None) -> BenchRow:
    served = job.served(made.session)
    with torch.no_grad():
        output = job.judged.cloned().call(served)
    found = distances(output, made.planned, job.output)
    metric = None
    if evaluate is not None:
        metric = number(partial(evaluate, served), name_of(evaluate))
    if made.planned is None:
        verdict = verdict_of_float(row.title, found)
    else:
        verdict = verdict_of(row.title, found, made.planned, made.alone)
    return replace(
        row,
        nbytes=made.nbytes,
        distances=found,
        metric=metric,
        kernels=made.kernels,
        findings=verdict.findings,
        farthest=verdict.farthest,
    )


def _with_times(row: BenchRow, times: Mapping[str, Seconds]) -> BenchRow:
    if row.title not in times:
        return row
    own = times[row.title]
    return replace(row, time=Timing.of(own), speed=Speed.of(own, times[WAYS[0].title]))


def _fastest(rows: Sequence[BenchRow]) -> BenchRow | None:
    """The fastest of those that are right."""
    right = [(row.time.seconds, row) for row in rows if row.time and not row.findings]
    return min(right, key=lambda each: each[0])[1] if right else None


def _as_fast(
    fastest: BenchRow | None, rows: Sequence[BenchRow], times: Mapping[str, Seconds]
) -> Iterator[str]:
    """The titles of others that are right, and not slower than the fastest beyond noise."""
    if fastest is None:
        return
    for row in rows:
        is_other = row.time is not None and not row.findings and row != fastest
        if is_other and not Speed.of(times[row.title], times[fastest.title]).is_slower:
            yield row.title


def race(sessions: Mapping[str, Session], inputs: Inputs, threads: int) -> dict[str, Seconds]:
    """The seconds of a call of each, round by round.

    With one thread this is CPU time, which other load on the machine does not add to; several
    threads share their work, and what counts is wall time.
    """
    now = time.process_time if threads == 1 else time.perf_counter
    passes = {name: Pass(each.run, [inputs], now=now) for name, each in sessions.items()}
    run_in_turn(list(passes.values()), _LEAST_ROUNDS, _MOST_ROUNDS, _BUDGET)
    return {name: each.whole for name, each in passes.items()}
