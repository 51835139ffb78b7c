"""What a search found: the recipe, how far it got, and every trial."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qrecipe.authoring.tune_log import cost_json, trial_json
from qrecipe.authoring.tune_search import SiteCost, Trial
from qrecipe.measure.overlay import float_rules, overlay_recipe, rule_key, save_overlay
from qrecipe.recipe import Ingredient, Recipe, published
from qrecipe.references import path_text
from qrecipe.tables import render_table

Stop = Literal["trials", "seconds", "interrupt"]
"""What ended a search before it was through."""

_WORDS: Mapping[Stop, str] = {
    "trials": "Stopped at the most trials allowed",
    "seconds": "Stopped when the time was over",
    "interrupt": "Interrupted",
}


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The best recipe that was verified, and the trials in order.

    ``reached`` tells whether it is within the budget: ``metric`` at least ``float_metric`` less
    ``max_drop``. ``float_share`` is the share of the float model's time that the sites take which
    it leaves float, 0 to 1. ``ranking`` has the sites that could stay float, the most sensitive
    first; it is empty where the search came to no float sites. ``stopped`` says what ended the
    search early, None where it was through.
    """

    recipe: Recipe
    trials: tuple[Trial, ...]
    reached: bool
    metric: float | None
    float_metric: float
    max_drop: float
    float_sites: tuple[str, ...]
    float_share: float
    ranking: tuple[SiteCost, ...]
    stopped: Stop | None
    _base: Recipe = field(repr=False)
    _values: Mapping[str, Any] = field(repr=False)

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """The files that the recipe is made of from which the search started."""
        return self._base.ingredients

    @property
    def distance(self) -> float | None:
        """How far the best is below what is allowed, 0 where it is within; None without one."""
        if self.metric is None:
            return None
        return max(0.0, self.float_metric - self.max_drop - self.metric)

    def save(self, path: str | os.PathLike[str]) -> Recipe:
        """Write the recipe as a file that extends the one it started from, and load it.

        Raises ``RecipeReferenceError`` (QR001) where it cannot be written or would take the place
        of something else than a recipe.
        """
        return save_overlay(self._base, self._values, Path(path_text(path, "save takes a path")))

    def __str__(self) -> str:
        rows = [
            (str(number), _metric(trial.metric), _mark(trial), trial.what)
            for number, trial in enumerate(self.trials, 1)
        ]
        table = render_table(("trial", "metric", "", "what"), rows)
        return "\n\n".join([table, "\n".join(self.notes)])

    @property
    def notes(self) -> tuple[str, ...]:
        """What was wanted and what was found, in sentences."""
        notes = [*_budget(self.float_metric, self.max_drop), *_verdict(self)]
        if self.stopped is not None:
            notes.append(f"{_WORDS[self.stopped]}; with a log the search can go on from here.")
        return (*notes, *published(self.ingredients))

    def to_json(self) -> str:
        """Stable keys; the recipe as TOML text."""
        return json.dumps(tuning_json(self), indent=2)


def tuning_json(result: TuningResult) -> dict[str, Any]:
    """A result as plain values."""
    return {
        "ingredients": [each.to_json() for each in result.ingredients],
        "reached": result.reached,
        "metric": result.metric,
        "float_metric": result.float_metric,
        "max_drop": result.max_drop,
        "distance": result.distance,
        "float_sites": list(result.float_sites),
        "float_share": result.float_share,
        "ranking": [cost_json(cost) for cost in result.ranking],
        "stopped": result.stopped,
        "trials": [trial_json(trial) for trial in result.trials],
        "recipe": result.recipe.to_toml(),
    }


def found(
    base: Recipe,
    trials: Sequence[Trial],
    best: Trial,
    costs: Sequence[SiteCost],
    budget: tuple[float, float],
    members: frozenset[str],
    stopped: Stop | None,
) -> TuningResult:
    """The result for the best trial; ``budget`` is the float metric and what may be lost."""
    float_metric, max_drop = budget
    left = [cost for cost in costs if cost.name in best.candidate.floats]
    reasons = {
        rule_key(cost.name, members): _reason(cost, best, trials, float_metric - max_drop)
        for cost in left
    }
    values: dict[str, Any] = {
        "tensor": best.candidate.tensors,
        **(float_rules(reasons) if reasons else {}),
    }
    result = TuningResult(
        recipe=base,
        trials=tuple(trials),
        reached=best.within,
        metric=best.metric,
        float_metric=float_metric,
        max_drop=max_drop,
        float_sites=tuple(cost.name for cost in left),
        float_share=sum(cost.share for cost in left),
        ranking=tuple(costs),
        stopped=stopped,
        _base=base,
        _values=values,
    )
    return _described(result, best)


def _described(result: TuningResult, best: Trial) -> TuningResult:
    """The same with a recipe that tells in its description what the search found."""
    sentences = [
        *_budget(result.float_metric, result.max_drop),
        *_verdict(result),
        *_lever_notes(result, best),
    ]
    values = {"description": "\n".join(sentences) + "\n", **result._values}
    return replace(result, recipe=overlay_recipe(result._base, values), _values=values)


def _lever_notes(result: TuningResult, best: Trial) -> Iterator[str]:
    before = result.trials[0]
    for trial in result.trials:
        levers = trial.candidate.levers
        if trial.kept and levers and not trial.candidate.floats:
            if levers == best.candidate.levers[: len(levers)]:
                gain = f"{_metric(before.metric)} -> {_metric(trial.metric)}"
                yield f"{levers[-1].what[0].upper()}{levers[-1].what[1:]}: {gain}."
            before = trial


def _budget(float_metric: float, max_drop: float) -> Iterator[str]:
    least = float_metric - max_drop
    yield f"The float model has {float_metric:.6g}, so that {least:.6g} is wanted."


def _verdict(result: TuningResult) -> Iterator[str]:
    count = len(result.float_sites)
    left = "no site" if not count else "1 site" if count == 1 else f"{count} sites"
    share = f" ({result.float_share:.0%} of the float model's time)" if count else ""
    where = f"{_metric(result.metric)} with {left} left float{share}"
    if result.reached:
        yield f"Reached: {where}."
        return
    distance = "" if result.distance is None else f", {result.distance:.4g} too little"
    yield f"Not reached: the best is {where}{distance}."
    yield 'Training can win back what calibration cannot: phase = "qat", see docs/training.md.'


def _reason(cost: SiteCost, best: Trial, trials: Sequence[Trial], least: float) -> str:
    """What quantizing it alone costs, and what the accuracy was with it in int8 again."""
    without = best.candidate.floats - {cost.name}
    for trial in trials:
        if trial.candidate.levers == best.candidate.levers and trial.candidate.floats == without:
            return (
                f"{cost.reason}; in int8 the accuracy is {_metric(trial.metric)}, not {least:.6g}"
            )
    return cost.reason


def _metric(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _mark(trial: Trial) -> str:
    if trial.error is not None:
        return "failed"
    return ("within, " if trial.within else "") + ("kept" if trial.kept else "not kept")
