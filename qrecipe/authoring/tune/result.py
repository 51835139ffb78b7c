"""The result of a search: the recipe, what it reaches, and all trials."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qrecipe.authoring.fastest.fastest import reasons_of
from qrecipe.authoring.tune.estimates import Estimates, SiteCost
from qrecipe.authoring.tune.levers import Candidate
from qrecipe.authoring.tune.log import trial_json
from qrecipe.authoring.tune.search import Search, Trial
from qrecipe.authoring.tune.trials import Stop
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import counted
from qrecipe.files import path_text
from qrecipe.planning.plan import Plan
from qrecipe.recipe.overlay import make_directory, overlay_recipe, overlay_values, save_overlay
from qrecipe.recipe.recipe import Ingredient, Recipe, published
from qrecipe.rules.resolution import listed
from qrecipe.terminal.report import Result, Section, Table, Text, values_of

_WORDS: Mapping[Stop, str] = {
    "trials": "Stopped after the maximum number of trials",
    "seconds": "Stopped when time ran out",
    "interrupt": "Interrupted",
}


@dataclass(frozen=True, slots=True, repr=False)
class TuningResult(Result):
    """The best recipe that was verified, and the trials in order.

    ``reached`` tells whether it is within the budget: ``metric`` is at least ``float_metric`` minus
    ``max_drop``. A recipe within the budget that was chosen from several is quantized and evaluated
    again and has to be within it both times; ``metric`` is the second, unbiased value.
    ``float_sites`` are the sites that the search leaves float and ``float_share`` their share of
    the float model's time, 0 to 1; ``base_float_sites`` are left float by a rule of the base
    recipe. ``ranking`` has the sites that could stay float, the most sensitive first; it is empty
    if the search did not need it. ``stopped`` says what ended the search early, None if nothing
    did. ``latency`` is the time of the recipe's first call as a multiple of the float model's,
    where it was measured, and ``is_slower`` tells whether the recipe was slower whenever it was.
    ``front`` has the trials that are more accurate than any faster one, the fastest first.
    """

    recipe: Recipe
    trials: tuple[Trial, ...]
    reached: bool
    metric: float | None
    float_metric: float
    max_drop: float
    float_sites: tuple[str, ...]
    float_share: float
    base_float_sites: tuple[str, ...]
    ranking: tuple[SiteCost, ...]
    stopped: Stop | None
    latency: float | None
    is_slower: bool
    _base: Recipe = field(repr=False)
    _planned: Plan = field(hash=False, repr=False)
    _values: Mapping[str, Any] = field(hash=False, repr=False)
    _estimates: Estimates = field(hash=False, repr=False)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials between which accuracy and latency have to be weighed."""
        return front_of(self.trials)

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """The files of the base recipe."""
        return self._base.ingredients

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What the plan of the base recipe warns of, such as that nothing is quantized (QR221)."""
        return self._planned.warnings

    @property
    def distance(self) -> float | None:
        """How far the best is below the target, 0 if it is reached; None without a metric."""
        if self.metric is None:
            return None
        return max(0.0, self.float_metric - self.max_drop - self.metric)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as a file that extends the one it started from.

        Raises ``RecipeReferenceError`` (QR001) if it cannot be written or would overwrite a file
        that is not a recipe.
        """
        save_overlay(self._base, self._values, Path(path_text(path, "save takes a path")))

    def save_front(self, directory: str | os.PathLike[str]) -> None:
        """Write the recipe of each trial of the front: ``1.toml`` is the fastest.

        Raises ``RecipeReferenceError`` (QR001) if the directory cannot be made or is not empty.
        """
        folder = Path(path_text(directory, "save_front takes a path"))
        make_directory(folder)
        for number, trial in enumerate(self.front, 1):
            values = _values(self._planned, self._estimates, trial, self.trials)
            values = {"description": f"{_point(trial, self.float_metric)}\n", **values}
            save_overlay(self._base, values, folder / f"{number}.toml")

    def _sections(self) -> Iterator[Section]:
        rows = [
            (
                str(number),
                _metric(trial.metric),
                _mark(trial),
                trial.what if trial.error is None else f"{trial.what}: {trial.error}",
            )
            for number, trial in enumerate(self.trials, 1)
        ]
        yield Table("Trials", ("trial", "metric", "", "what"), rows, numeric=frozenset({0, 1}))
        yield Text("Result", self.notes)

    @property
    def float_anyway(self) -> tuple[str, ...]:
        """The sites that the base recipe cannot quantize: without a kernel, or after float ones."""
        return tuple(
            site.name
            for site in self._planned.sites
            if site.verdict == "float" and site.name not in self.base_float_sites
        )

    @property
    def outcome(self) -> str:
        """Whether the target is reached, and at what cost, in a sentence."""
        by = " by the search" if self.base_float_sites or self.float_anyway else ""
        sites = counted(len(self.float_sites), "site") if self.float_sites else "no sites"
        left = f"{sites} left float{by}"
        if not any(site.verdict == "quantized" for site in self._planned.sites):
            left = "nothing quantized"
        elif self.float_sites:
            left += f" ({self.float_share:.0%} of the float model's time)"
        if self.metric is None:
            return f"Not reached: no accuracy with {left}."
        if self.reached:
            return f"Reached: {_metric(self.metric)} with {left}."
        missing = "" if not self.distance else f", {self.distance:.4g} short"
        return f"Not reached: the best is {_metric(self.metric)} with {left}{missing}."

    @property
    def notes(self) -> tuple[str, ...]:
        """The target and what was found, in sentences."""
        notes = list(_verdict(self))
        if self.is_slower:  # not in the recipe: another run may measure something else
            notes.append(
                f"It is slower than the float model here: {_metric(self.latency)} times its time. "
                "qrecipe fastest only looks for speed."
            )
        if self.stopped is not None:
            notes.append(f"{_WORDS[self.stopped]}; with a log, the search can be resumed.")
        return (*notes, *published(self.ingredients))

    def _document(self) -> dict[str, Any]:
        names = (
            *("ingredients", "reached", "metric", "float_metric", "max_drop", "distance"),
            *("float_sites", "float_share", "base_float_sites", "float_anyway", "ranking"),
            *("stopped", "latency", "is_slower", "warnings"),
        )
        return {
            **values_of(self, *names),
            "trials": [trial_json(trial) for trial in self.trials],
            "front": [self.trials.index(trial) + 1 for trial in self.front],
            "recipe": self.recipe.to_toml(),
        }


def found(
    base: Recipe,
    search: Search,
    float_metric: float,
    max_drop: float,
    planned: Plan,
    base_float_sites: tuple[str, ...],
    stopped: Stop | None,
) -> TuningResult:
    """The result of a search that is complete, or was ended by ``stopped``."""
    best, trials, ranking = search.best, search.trials, search.estimates.ranking
    floats = best.candidate.floats
    values = _values(planned, search.estimates, best, trials)
    last = trials[-1] if trials[-1].is_repeated else best
    result = TuningResult(
        recipe=base,
        trials=tuple(trials),
        reached=best.within and last.within,
        metric=last.metric,
        float_metric=float_metric,
        max_drop=max_drop,
        float_sites=tuple(_reasons(search.estimates, best, trials)),
        float_share=sum(cost.share for cost in ranking if cost.name in floats),
        base_float_sites=base_float_sites,
        ranking=ranking,
        stopped=stopped,
        latency=last.latency,
        is_slower=best.is_slower and last.is_slower,
        _base=base,
        _planned=planned,
        _values=values,
        _estimates=search.estimates,
    )
    sentences = [*_verdict(result), *_lever_notes(result, best)]
    values = {"description": "\n".join(sentences) + "\n", **values}
    return replace(result, recipe=overlay_recipe(base, values), _values=values)


def _lever_notes(result: TuningResult, best: Trial) -> Iterator[str]:
    """What each lever of the recipe gained when it was tried."""
    metrics = {trial.candidate: trial.metric for trial in reversed(result.trials)}
    for lever in best.candidate.levers:
        levers = next(
            trial.candidate.levers
            for trial in result.trials
            if trial.candidate.levers[-1:] == (lever,)
        )
        before, after = metrics[Candidate(levers[:-1])], metrics[Candidate(levers)]
        what = f"{lever.what[0].upper()}{lever.what[1:]}"
        yield f"{what}: {_metric(before)} -> {_metric(after)}."


def _verdict(result: TuningResult) -> Iterator[str]:
    whole, least = _metric(result.float_metric), _metric(result.float_metric - result.max_drop)
    yield f"The float model reaches {whole}, so the target is {least}."
    yield result.outcome
    yield from _repetition(result.trials)
    if result.base_float_sites:
        names = listed(result.base_float_sites)
        count = counted(len(result.base_float_sites), "site")
        yield f"The base recipe itself leaves {count} float: {names}."
    if result.float_anyway:
        count = counted(len(result.float_anyway), "site")
        yield f"Float anyway, without a kernel or after a float site: {count}."
    if not result.reached:
        yield 'Training can recover more than calibration: phase = "qat", see docs/training.md.'


def _repetition(trials: Sequence[Trial]) -> Iterator[str]:
    """What the second evaluation of the best gave, if it differs."""
    last = trials[-1]
    if not last.is_repeated:
        return
    first = next(trial for trial in trials if trial.candidate == last.candidate)
    chosen = f"It had {_metric(first.metric)} when it was chosen"
    if last.error is not None:
        yield f"{chosen}, but failed when it was quantized again: {last.error}."
    elif last.metric != first.metric:
        again = f"{_metric(last.metric)} when it was quantized and evaluated again"
        yield f"{chosen}, but {again}: the evaluation is noisy, use more data."


def _values(
    planned: Plan, estimates: Estimates, trial: Trial, trials: Sequence[Trial]
) -> dict[str, Any]:
    """What the recipe of a trial adds to the base, with the reasons."""
    rules = overlay_values(_reasons(estimates, trial, trials), planned.members)
    return {"tensor": trial.candidate.tensors, **rules}


def _point(trial: Trial, float_metric: float) -> str:
    """What was measured, in a sentence."""
    return (
        f"{_metric(trial.metric)} in {_metric(trial.latency)} of the float model's time; the float "
        f"model reaches {_metric(float_metric)}."
    )


def _reasons(estimates: Estimates, best: Trial, trials: Sequence[Trial]) -> dict[str, str]:
    """Why each site is float, the most sensitive first: its error, its time, or both."""
    floats, costs = best.candidate.floats, estimates.costs
    faster, left = estimates.faster_float(), costs.with_followers(floats)
    by_time = reasons_of(costs, left)
    by_error = {
        cost.name: _reason(cost, best, trials) for cost in estimates.ranking if cost.name in floats
    }
    both = {
        name: f"{by_time[name]}; {reason}" if name in faster and name in by_time else reason
        for name, reason in by_error.items()
    }
    return {**both, **{name: by_time[name] for name in by_time if name in floats - both.keys()}}


def _reason(cost: SiteCost, best: Trial, trials: Sequence[Trial]) -> str:
    """The cost of quantizing it alone, and the accuracy with and without it in int8."""
    metrics = {trial.candidate: trial for trial in reversed(trials)}
    floats = best.candidate.floats
    levers = dict.fromkeys([best.candidate.levers, *(t.candidate.levers for t in trials)])
    for each in levers:  # those of the best, else others that both were tried with
        within = metrics.get(Candidate(each, floats))
        without = metrics.get(Candidate(each, floats - {cost.name}))
        if within is not None and without is not None:
            more = "" if each == best.candidate.levers else " (measured with more levers)"
            return (
                f"{cost.reason}; with it in int8 the accuracy is {_metric(without.metric)}, "
                f"with it float {_metric(within.metric)}{more}"
            )
    return cost.reason


def _metric(value: float | None) -> str:
    return "none" if value is None else f"{value + 0.0:.6g}"  # no -0


def _mark(trial: Trial) -> str:
    if trial.error is not None:
        return "failed"
    return ("within, " if trial.within else "") + ("kept" if trial.kept else "not kept")


def front_of(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that are more accurate than any faster one, the fastest first.

    Trials without a metric or a latency are left out, as is the second measurement of the best.
    """
    measured = [
        (trial.latency, -trial.metric, place)
        for place, trial in enumerate(trials)
        if trial.latency is not None and trial.metric is not None and not trial.is_repeated
    ]
    found: list[Trial] = []
    for _, _, place in sorted(measured):
        if not found or trials[place].score > found[-1].score:
            found.append(trials[place])
    return tuple(found)
