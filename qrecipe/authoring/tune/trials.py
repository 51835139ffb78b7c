"""Quantizing and measuring the candidates of a search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from qrecipe.authoring.fastest.costs import Costs, costs_of
from qrecipe.authoring.fastest.cut import mixture_of
from qrecipe.authoring.fastest.fastest import race
from qrecipe.authoring.tune.cheapest_sets import SiteCost
from qrecipe.authoring.tune.estimates import Estimates
from qrecipe.authoring.tune.levers import Candidate, Lever, digest_of
from qrecipe.authoring.tune.log import TrialLog, again
from qrecipe.authoring.tune.search import Measured, Trial
from qrecipe.errors.findings import ExecutionError, QRecipeError, RecipeError
from qrecipe.errors.text import finite_or_none, first_line
from qrecipe.execution.batches import Forward, peek
from qrecipe.execution.calls import calls_of
from qrecipe.measure.latency import Latency, compare_latency
from qrecipe.measure.profile.profile import Bench, bench_of, measured
from qrecipe.measure.sensitivity.rank import Evaluate, sensitivity
from qrecipe.measure.sensitivity.ranking import Ranking
from qrecipe.measure.sensitivity.scores import number
from qrecipe.measure.turns import Speed
from qrecipe.model.copies import runnable_copy
from qrecipe.pipeline import quantize, simulate
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.overlay import overlay_recipe, rule_key
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import FLOAT
from qrecipe.terminal.progress import Progress

Stop = Literal["trials", "seconds", "interrupt"]
"""What ended a search early."""


class Stopped(Exception):  # noqa: N818
    """Ends the search at one of its limits."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why)
        self.why: Stop = why


@dataclass(slots=True)
class ModelBench:
    """Quantizes and evaluates candidates, or takes the result from the log.

    ``members`` are the calls of the model. No trial is started after ``max_trials``, or once
    `time.monotonic` has reached ``end``.
    """

    model: nn.Module
    base: Recipe
    batches: Iterable[Any]
    evaluate: Evaluate
    forward: Forward | None
    progress: Progress
    target_cpu: TargetCpu
    members: frozenset[str]
    log: TrialLog
    max_trials: float
    end: float
    _count: int = 0
    _succeeded: bool = False

    def measure(self, candidate: Candidate) -> Measured:
        """Raises ``Stopped`` at a limit."""
        try:
            recipe = self._recipe(candidate)
        except RecipeError as error:
            if not self._count:  # the errors of the unchanged recipe are the caller's
                raise
            self._check_count()
            return self._counted(Measured(None, 0.0, first_line(error)))
        return self._known_or_new(recipe, recipe.fingerprint)

    def repeat(self, candidate: Candidate) -> Measured:
        """Quantize and evaluate the candidate again. Raises ``Stopped`` at a limit."""
        recipe = self._recipe(candidate)
        return self._known_or_new(recipe, again(recipe.fingerprint))

    def record(self, trial: Trial) -> None:
        try:
            key = self._recipe(trial.candidate).fingerprint
        except RecipeError:
            key = digest_of(trial.candidate)  # it has no recipe, but gets its own entry in the log
        self.log.note_trial(again(key) if trial.is_repeated else key, trial)

    def _known_or_new(self, recipe: Recipe, key: str) -> Measured:
        self._check_count()
        known = self.log.measured(key)
        if known is None:
            if self._count:  # the unchanged recipe is measured however long it takes
                self._check_time()
            known = self._measured(recipe)
        return self._counted(known)

    def _check_count(self) -> None:
        if self._count >= self.max_trials:
            raise Stopped("trials")

    def _counted(self, measured: Measured) -> Measured:
        self._succeeded |= measured.metric is not None
        self._count += 1
        self.progress(self._count, None if math.isinf(self.max_trials) else int(self.max_trials))
        return measured

    def estimates(self, levers: tuple[Lever, ...]) -> Estimates:
        """Raises ``Stopped`` when time runs out, and lets ``KeyboardInterrupt`` through."""
        recipe = self._recipe(Candidate(levers))
        if recipe.fingerprint not in self.log.estimates:
            self._check_time()
            with unwarned():
                ranking = self._ranking(recipe)
                if ranking is not None and ranking.partial:
                    raise KeyboardInterrupt
                priced = self._priced(levers)
            self.log.note_estimates(recipe.fingerprint, estimates_of(ranking, priced))
        return self.log.estimates[recipe.fingerprint]

    def _check_time(self) -> None:
        if time.monotonic() >= self.end:
            raise Stopped("seconds")

    def _recipe(self, candidate: Candidate) -> Recipe:
        keys = [rule_key(name, self.members) for name in sorted(candidate.floats)]
        named = {key: {"qconfig": FLOAT} for key in keys}
        rules = {"rules": {"module_name": named}} if named else {}
        return overlay_recipe(self.base, {"tensor": candidate.tensors, **rules})

    def _measured(self, recipe: Recipe) -> Measured:
        start = time.monotonic()

        def failed(why: str) -> Measured:
            return Measured(None, time.monotonic() - start, why)

        if not self._count:
            converted = self._made(simulate, recipe)  # warnings and errors are the caller's
        else:
            try:
                with unwarned():
                    converted = self._made(simulate, recipe)
            except QRecipeError as error:
                return failed(first_line(error))
        try:
            metric = accuracy(self.evaluate, converted)
        except QRecipeError as error:
            if not self._succeeded:  # it may fail for every candidate
                raise
            return failed(first_line(error))
        if not math.isfinite(metric):
            return failed("evaluate returns no finite number")
        seconds = time.monotonic() - start
        latency = self._latency(converted)
        if latency is None:
            return Measured(metric, seconds)
        return Measured(metric, seconds, None, 1 / latency.speed.median, latency.speed.is_slower)

    def _latency(self, converted: nn.Module) -> Latency | None:
        """Against the float model; None if the kernels are those of another CPU."""
        if self.target_cpu != "this":
            return None
        plain, (first, _) = runnable_copy(self.model), peek(self.batches)
        inputs = calls_of(plain, first, 0, self.forward)[0].inputs
        return compare_latency(plain, converted, inputs, budget=0.0)

    def _made(self, make: Callable[..., nn.Module], recipe: Recipe) -> nn.Module:
        return make(
            self.model,
            as_calibrated(recipe),
            self.batches,
            forward=self.forward,
            progress=False,
            target_cpu=self.target_cpu,
        )

    def _ranking(self, recipe: Recipe) -> Ranking | None:
        """By SQNR, or by the metric if the output has no floating tensor; None without sites."""
        return self._ranked(recipe, None) or self._ranked(recipe, self.evaluate)

    def _ranked(self, recipe: Recipe, evaluate: Evaluate | None) -> Ranking | None:
        try:
            return sensitivity(
                self.model,
                recipe,
                self.batches,
                evaluate=evaluate,
                forward=self.forward,
                progress=False,
                target_cpu=self.target_cpu,
            )
        except ExecutionError as error:
            if {finding.code for finding in error.findings} != {"QR422"}:
                raise
            return None

    def _priced(self, levers: tuple[Lever, ...]) -> Costs:
        """The times of all sites.

        Float gains only where the choice that is best by prediction turns out to be faster.
        """
        recipe = self._recipe(Candidate(levers))
        bench = bench_of(self.model, recipe, self.batches, self.forward, False, self.target_cpu)
        costs = costs_of(measured(bench, False), bench.plan, bench.inventory.structure)
        mixture = mixture_of(costs)
        mixed = Candidate(levers, costs.needing_a_rule(mixture.floats))
        is_real = mixture.is_promising and self._is_faster(bench, mixed)
        return costs if is_real else costs.without_losses()

    def _is_faster(self, bench: Bench, mixed: Candidate) -> bool:
        try:
            converted = self._made(quantize, self._recipe(mixed))
        except QRecipeError:
            return False
        raced = race(bench, converted, False)
        return raced.mixture is not None and Speed.of(raced.mixture, raced.recipe).is_faster


def estimates_of(ranking: Ranking | None, costs: Costs) -> Estimates:
    """The ranking with each site's share of the float model's time, and the costs."""
    if ranking is None:
        return Estimates((), costs)
    times = {site.name: site.contiguous for site in costs.sites}
    whole = (math.fsum(times.values()) + costs.rest) or 1.0
    sites = (
        SiteCost(
            site.name,
            ranking.reason(site),
            times.get(site.name, 0.0) / whole,
            finite_or_none(site.sqnr_db),
        )
        for site in ranking.sites
    )
    return Estimates(tuple(sites), costs)


def as_calibrated(recipe: Recipe) -> Recipe:
    """A recipe for training is tuned without training."""
    return replace(recipe, phase="ptq")


def accuracy(evaluate: Evaluate, model: nn.Module) -> float:
    """The result of the evaluation, -inf for NaN: a failed trial and not an error."""

    def comparable() -> float:
        value = evaluate(model)
        return -math.inf if value != value else value

    return number(comparable, "evaluate")
