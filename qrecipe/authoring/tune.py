"""A recipe within an accuracy budget that leaves as little float as can be found."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.authoring.tune_candidate import Candidate, Lever, levers_of
from qrecipe.authoring.tune_log import TrialLog, open_log
from qrecipe.authoring.tune_result import Stop, TuningResult, found
from qrecipe.authoring.tune_search import Measured, Search, SiteCost, Trial
from qrecipe.calibration import Forward, inputs_of_batch, limited, peek
from qrecipe.copying import runnable_copy
from qrecipe.errors import (
    ExecutionError,
    Finding,
    QRecipeError,
    QRecipeWarning,
    counted,
    first_line,
)
from qrecipe.linting import warn
from qrecipe.measure.analysis import Evaluate, sensitivity
from qrecipe.measure.batches import rereadable
from qrecipe.measure.comparison import compare
from qrecipe.measure.fidelity import finite_or_none
from qrecipe.measure.overlay import float_rules, overlay_recipe, rule_key
from qrecipe.measure.ranking import Ranking
from qrecipe.measure.scores import number
from qrecipe.pipeline import inventory_of, quantize
from qrecipe.planning import Plan, make_plan
from qrecipe.progress import Progress, terminal_progress
from qrecipe.recipe import Recipe, load_recipe
from qrecipe.references import path_text

_ROUNDING = 1e-9
"""How much of a metric is rounding: 0.986 - 0.01 is a little more than 0.976."""


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
    progress: Progress | None = None,
) -> TuningResult:
    """Search for a recipe that loses at most ``max_drop`` and leaves as little float as it can.

    Levers that cost no time come first, then sites are left float by their sensitivity and
    returned to int8 by their time. Whatever is given back has been measured as it is.

    Args:
        recipe: what to start from; the result extends it.
        batches: as in `qrecipe.calibrate`; they calibrate, and rank the sites.
        evaluate: ``evaluate(model) -> float``, more is better; called once for each trial.
        max_drop: what may be lost of the float model's metric, in its own units.
        max_trials: the most trials, those of an interrupted search among them.
        max_seconds: starts no trial after that; one that runs is finished.
        resume: a file that is written after each trial, and gone on from where it is there.

    An interrupt (``KeyboardInterrupt``) gives the best that was found by then, and a warning
    (QR218); a budget that was not met another (QR219).

    Raises:
        RecipeError, PlanError, CalibrationError: as `qrecipe.quantize`, of the recipe as it is.
        ExecutionError: ``evaluate`` gives no number (QR423, QR330), a log that cannot be used
            (QR331, QR332), bounds that make no sense (QR333).
    """
    _check_bounds(max_drop, max_trials, max_seconds)
    base = load_recipe(recipe)
    held = rereadable(batches, base.calibration.max_batches)
    planned = _planned(model, base, held, forward)
    path = None if resume is None else Path(path_text(resume, "resume takes a path"))
    log = open_log(path, base.fingerprint, _digest(model))
    show = progress or terminal_progress("tuning")
    bench = _Bench(model, base, planned, held, evaluate, forward, log, show)
    bench.limit(max_trials, max_seconds)
    float_metric = _float_metric(model, evaluate, log)
    least = float_metric - max_drop
    target = least - _ROUNDING * max(1.0, abs(least))
    search = Search(bench, levers_of(base, planned), target, bench.record)
    stopped = _run(search)
    budget = (float_metric, max_drop)
    members = bench.members
    result = found(base, search.trials, search.best, search.costs, budget, members, stopped)
    _warn(result, base)
    return result


class _Stopped(Exception):  # noqa: N818
    """Ends the search at one of its bounds."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why)
        self.why: Stop = why


def _run(search: Search) -> Stop | None:
    try:
        search.run()
    except _Stopped as stop:
        return stop.why
    except KeyboardInterrupt:
        if not search.trials:
            raise
        return "interrupt"
    return None


class _Bench:
    """Makes and evaluates candidates, or remembers what an earlier run measured of them."""

    def __init__(
        self,
        model: nn.Module,
        base: Recipe,
        planned: Plan,
        batches: Iterable[Any],
        evaluate: Evaluate,
        forward: Forward | None,
        log: TrialLog,
        progress: Progress,
    ) -> None:
        self._model = model
        self._base = base
        self._batches = batches
        self._evaluate = evaluate
        self._forward = forward
        self._log = log
        self._progress = progress
        self._count = 0
        self._most: int | None = None
        self._end = math.inf
        self.members = frozenset(member for site in planned.sites for member in site.members)

    def limit(self, trials: int | None, seconds: float | None) -> None:
        """Start no more than so many trials, and none after so many seconds from now."""
        self._most = trials
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def measure(self, candidate: Candidate) -> Measured:
        """Raises ``_Stopped`` at a bound."""
        recipe = self._recipe(candidate)
        known = self._log.measured(recipe.fingerprint)
        if self._most is not None and self._count >= self._most:
            raise _Stopped("trials")
        if known is None:
            if self._count:  # the recipe as it is has to be known whatever it takes
                self._check_time()
            known = self._measured(candidate, recipe)
        self._count += 1
        self._progress(self._count, None)
        return known

    def record(self, trial: Trial) -> None:
        self._log.note_trial(self._recipe(trial.candidate).fingerprint, trial)

    def costs(self, levers: tuple[Lever, ...]) -> Sequence[SiteCost]:
        """Raises ``_Stopped`` when the time is over, and ``KeyboardInterrupt`` as it comes."""
        recipe = self._recipe(Candidate(levers))
        if recipe.fingerprint not in self._log.costs:
            self._check_time()
            with _unwarned():
                ranking = self._ranking(recipe)
                shares = self._shares(recipe)
            if ranking is not None and ranking.partial:
                raise KeyboardInterrupt
            costs = [] if ranking is None else _costs(ranking, shares)
            self._log.note_costs(recipe.fingerprint, costs)
        return self._log.costs[recipe.fingerprint]

    def _check_time(self) -> None:
        if time.monotonic() >= self._end:
            raise _Stopped("seconds")

    def _recipe(self, candidate: Candidate) -> Recipe:
        keys = {rule_key(name, self.members): "" for name in sorted(candidate.floats)}
        rules = float_rules(keys) if keys else {}
        return overlay_recipe(self._base, {"tensor": candidate.tensors, **rules})

    def _measured(self, candidate: Candidate, recipe: Recipe) -> Measured:
        start = time.monotonic()
        if candidate == Candidate():
            converted = self._quantized(recipe)  # its warnings and errors are the caller's
        else:
            try:
                with _unwarned():
                    converted = self._quantized(recipe)
            except QRecipeError as error:
                return Measured(None, time.monotonic() - start, first_line(error))
        metric = _accuracy(self._evaluate, converted)
        seconds = time.monotonic() - start
        if not math.isfinite(metric):
            return Measured(None, seconds, "evaluate gives no finite number")
        return Measured(metric, seconds)

    def _quantized(self, recipe: Recipe) -> nn.Module:
        calibrated = _as_calibrated(recipe)
        return quantize(
            self._model, calibrated, self._batches, forward=self._forward, progress=_silent
        )

    def _ranking(self, recipe: Recipe) -> Ranking | None:
        """By SQNR; by the metric where the output holds no floating tensor, None without sites."""
        return self._ranked(recipe, None) or self._ranked(recipe, self._evaluate)

    def _ranked(self, recipe: Recipe, evaluate: Evaluate | None) -> Ranking | None:
        try:
            return sensitivity(
                self._model,
                recipe,
                self._batches,
                evaluate=evaluate,
                forward=self._forward,
                progress=_silent,
            )
        except ExecutionError as error:
            if {finding.code for finding in error.findings} != {"QR422"}:
                raise
            return None

    def _shares(self, recipe: Recipe) -> dict[str, float]:
        """The share of each site in the time of the float model."""
        one = list(limited(self._batches, 1))
        reference = runnable_copy(self._model)
        report = compare(reference, self._quantized(recipe), one, self._forward, _silent)
        return {site.name: site.float_share for site in report.sites}


def _costs(ranking: Ranking, shares: Mapping[str, float]) -> list[SiteCost]:
    return [
        SiteCost(
            site.name,
            ranking.reason(site),
            shares.get(site.name, 0.0),
            finite_or_none(site.sqnr_db),
        )
        for site in ranking.sites
    ]


def _silent(done: int, total: int | None) -> None:
    pass


@contextmanager
def _unwarned() -> Iterator[None]:
    """What a candidate would warn about is measured, or has been said of the first one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        yield


def _as_calibrated(recipe: Recipe) -> Recipe:
    """A recipe for training is tuned as it is without training."""
    return replace(recipe, phase="ptq")


def _planned(
    model: nn.Module, recipe: Recipe, batches: Iterable[Any], forward: Forward | None
) -> Plan:
    first, _ = peek(batches)
    calibrated = _as_calibrated(recipe)
    # quantizing warns again
    with _unwarned(), inputs_of_batch(model, first, forward) as inputs:
        return make_plan(inventory_of(model, calibrated, inputs), calibrated)


def _float_metric(model: nn.Module, evaluate: Evaluate, log: TrialLog) -> float:
    if log.float_metric is not None:
        return log.float_metric
    metric = _accuracy(evaluate, runnable_copy(model))
    if not math.isfinite(metric):
        raise ExecutionError(
            Finding(
                "QR330",
                "evaluate gives no finite number for the float model",
                hint="return how good a model is as a float; more is better",
            )
        )
    log.note_float(metric)
    return metric


def _accuracy(evaluate: Evaluate, model: nn.Module) -> float:
    """What the evaluation gives, -inf for NaN: of a candidate that is a failed trial, no error."""

    def comparable() -> float:
        value = evaluate(model)
        return -math.inf if value != value else value

    return number(comparable, "evaluate")


def _digest(model: nn.Module) -> str:
    """What tells models apart: names, shapes and contents of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        content = _content(tensor.detach()) if tensor.numel() else 0
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {content}\n".encode())
    return digest.hexdigest()


def _content(tensor: Tensor) -> int:
    return int(torch.hash_tensor(tensor).view(torch.int64).item())


def _check_bounds(max_drop: float, max_trials: int | None, max_seconds: float | None) -> None:
    problems = []
    if not (math.isfinite(max_drop) and max_drop >= 0):
        problems.append(f"max_drop is {max_drop}: what may be lost is 0 or more")
    if max_trials is not None and max_trials < 1:
        problems.append(f"max_trials is {max_trials}: one trial is the least")
    if max_seconds is not None and not max_seconds > 0:
        problems.append(f"max_seconds is {max_seconds}, and no time to search in")
    if problems:
        raise ExecutionError([Finding("QR333", problem) for problem in problems])


def _warn(result: TuningResult, base: Recipe) -> None:
    if result.stopped == "interrupt":
        met = "met" if result.reached else "not met by then"
        text = f"interrupted after {counted(len(result.trials), 'trial')}, the budget {met}"
        warn(Finding("QR218", text, hint="the recipe is the best of those"), base.lint)
    elif not result.reached:
        distance = "" if result.distance is None else f" by {result.distance:.4g}"
        warn(
            Finding(
                "QR219",
                f"the best recipe of {counted(len(result.trials), 'trial')} misses the "
                f"budget{distance}",
                hint='training can win back what calibration cannot: phase = "qat"',
            ),
            base.lint,
        )
