"""The trials of a search: from the log, or tried here or on workers, within the limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from qrecipe.authoring.fastest.costs import Costs, costs_of
from qrecipe.authoring.fastest.cut import mixture_of
from qrecipe.authoring.fastest.fastest import race
from qrecipe.authoring.tune.ahead import Ahead, Wanted, upcoming
from qrecipe.authoring.tune.estimates import Estimates, SiteCost
from qrecipe.authoring.tune.levers import Candidate, Lever, digest_of
from qrecipe.authoring.tune.log import TrialLog, again
from qrecipe.authoring.tune.search import Bench as SearchBench
from qrecipe.authoring.tune.search import Measured, Search, Trial
from qrecipe.authoring.tune.trying import Trying, Values
from qrecipe.errors.findings import ExecutionError, QRecipeError, RecipeError
from qrecipe.errors.text import finite_or_none, first_line
from qrecipe.measure.profile.profile import Bench, bench_of, measured
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.measure.sensitivity.ranking import Ranking
from qrecipe.measure.sensitivity.steps import Evaluate
from qrecipe.measure.turns import Speed
from qrecipe.pipeline import quantize
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
    """Tries candidates, or takes the result from the log.

    ``members`` are the calls of the model. No trial is started after ``max_trials``, or once
    `time.monotonic` has reached ``end``. ``ahead`` tries candidates on workers, if there are any;
    ``begin`` starts the same search on another bench, to see what it may want next.
    """

    trying: Trying
    batches: Iterable[Any]
    progress: Progress
    members: frozenset[str]
    log: TrialLog
    max_trials: float
    end: float
    begin: Callable[[SearchBench], Search]
    ahead: Ahead | None
    _count: int = 0
    _succeeded: bool = False
    _recipes: dict[Candidate, Recipe] = field(default_factory=dict)

    def measure(self, candidate: Candidate) -> Measured:
        """Raises ``Stopped`` at a limit."""
        try:
            self._recipe(candidate)
        except RecipeError as error:
            if not self._count:  # the errors of the unchanged recipe are the caller's
                raise
            self._check_count()
            return self._counted(Measured(None, 0.0, first_line(error)))
        return self._known_or_new(candidate, is_again=False)

    def repeat(self, candidate: Candidate) -> Measured:
        """Quantize and evaluate the candidate again. Raises ``Stopped`` at a limit."""
        return self._known_or_new(candidate, is_again=True)

    def record(self, trial: Trial) -> None:
        try:
            key = self._key(trial.candidate, trial.is_repeated)
        except RecipeError:
            key = digest_of(trial.candidate)  # it has no recipe, but gets its own entry in the log
        self.log.note_trial(key, trial)

    def known(self, candidate: Candidate, is_again: bool) -> Measured | None:
        """What there is of a candidate without trying it."""
        try:
            key = self._key(candidate, is_again)
        except RecipeError as error:
            return Measured(None, 0.0, first_line(error))
        found = self.log.measured(key)
        return self.ahead.known(key) if found is None and self.ahead is not None else found

    def known_estimates(self, levers: tuple[Lever, ...]) -> Estimates | None:
        return self.log.estimates.get(self._recipe(Candidate(levers)).fingerprint)

    def _known_or_new(self, candidate: Candidate, is_again: bool) -> Measured:
        self._check_count()
        known = self.log.measured(self._key(candidate, is_again))
        if known is None:
            if self._count:  # the unchanged recipe is measured however long it takes
                self._check_time()
            known = self._measured(candidate, is_again)
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
            if self.ahead is not None:
                self.ahead.settle()  # times are measured where nothing else runs
            with unwarned():
                # by the metric if the output has no floating tensor
                ranking = self._ranked(recipe, None) or self._ranked(recipe, self.trying.evaluate)
                if ranking is not None and ranking.partial:
                    raise KeyboardInterrupt
                priced = self._priced(levers)
            self.log.note_estimates(recipe.fingerprint, estimates_of(ranking, priced))
        return self.log.estimates[recipe.fingerprint]

    def _check_time(self) -> None:
        if time.monotonic() >= self.end:
            raise Stopped("seconds")

    def _key(self, candidate: Candidate, is_again: bool) -> str:
        """The key in the log. Raises ``RecipeError`` if the candidate has no recipe."""
        fingerprint = self._recipe(candidate).fingerprint
        return again(fingerprint) if is_again else fingerprint

    def _recipe(self, candidate: Candidate) -> Recipe:
        if candidate not in self._recipes:
            values = self._values(candidate)
            self._recipes[candidate] = overlay_recipe(self.trying.recipe, values)
        return self._recipes[candidate]

    def _values(self, candidate: Candidate) -> Values:
        keys = [rule_key(name, self.members) for name in sorted(candidate.floats)]
        named = {key: {"qconfig": FLOAT} for key in keys}
        rules = {"rules": {"module_name": named}} if named else {}
        return {"tensor": candidate.tensors, **rules}

    def _measured(self, candidate: Candidate, is_again: bool) -> Measured:
        if self.ahead is not None:
            wanted = self._wanted(candidate, is_again)
            tried = self.ahead.tried(wanted, self._upcoming, aloud=not self._count)
        else:
            # warnings and errors of the unchanged recipe are the caller's
            with unwarned() if self._count else nullcontext():
                tried = self.trying.tried(self._recipe(candidate), self.batches)
        # an evaluation that has not succeeded yet may fail for every candidate
        if tried.error is not None and not (self._succeeded if tried.was_made else self._count):
            raise tried.error
        return tried.measured

    def _wanted(self, candidate: Candidate, is_again: bool) -> Wanted:
        return Wanted(self._key(candidate, is_again), candidate, self._values(candidate))

    def _upcoming(self) -> Iterator[Wanted]:
        """What the search may want next within the limits, the likeliest first."""
        if time.monotonic() < self.end:
            left = self.max_trials - self._count
            for number, (candidate, is_again) in enumerate(upcoming(self.begin, self)):
                if number >= left:
                    return
                yield self._wanted(candidate, is_again)

    def _ranked(self, recipe: Recipe, evaluate: Evaluate | None) -> Ranking | None:
        """By SQNR, or by ``evaluate``; None if there is no site to rank."""
        trying = self.trying
        try:
            return sensitivity(
                trying.model,
                recipe,
                self.batches,
                evaluate=evaluate,
                forward=trying.forward,
                progress=False,
                target_cpu=trying.target_cpu,
                pool=None if self.ahead is None else self.ahead.workers,
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
        trying = self.trying
        bench = bench_of(
            trying.model, recipe, self.batches, trying.forward, False, trying.target_cpu
        )
        costs = costs_of(measured(bench, False), bench.plan, bench.inventory.structure)
        mixture = mixture_of(costs)
        mixed = Candidate(levers, costs.needing_a_rule(mixture.floats))
        is_real = mixture.is_promising and self._is_faster(bench, mixed)
        return costs if is_real else costs.without_losses()

    def _is_faster(self, bench: Bench, mixed: Candidate) -> bool:
        try:
            converted = self.trying.made(quantize, self._recipe(mixed), self.batches)
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
