"""Choose int8 or float for each site by what was measured on this machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.authoring.fastest.costs import Costs, SitePrice, costs_of
from qrecipe.authoring.fastest.cut import LEAST_GAIN, Mixture, mixture_of
from qrecipe.errors.findings import QRecipeError
from qrecipe.errors.text import counted
from qrecipe.execution.batches import Forward
from qrecipe.execution.engine import engine_of
from qrecipe.files import path_text
from qrecipe.measure.profile.profile import Bench, bench_of, measured
from qrecipe.measure.profile.report import Profile
from qrecipe.measure.turns import Pass, Seconds, Speed, Timing, run_in_turn, twice
from qrecipe.pipeline import quantize
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.overlay import overlay_recipe, overlay_values, save_overlay
from qrecipe.recipe.recipe import Ingredient, Recipe, load_recipe, published
from qrecipe.terminal.progress import Progress, chosen_progress
from qrecipe.terminal.report import Result, Section, Table, Text, values_of


@dataclass(frozen=True, slots=True, repr=False)
class Fastest(Result):
    """The fastest of the given recipe, a mixture with more sites float, and float.

    ``winner`` says which it is, and ``recipe`` extends the given one accordingly. ``reasons`` has
    the sites that it leaves float for speed, the greatest loss first. The times are of whole
    models, measured in turns; ``mixture_time`` is None if no mixture was worth measuring.
    ``predicted_gain`` is the share of the recipe's time that the best mixture is predicted to save.
    ``is_faster_than_float`` says whether the result is faster than float, beyond noise. ``notes``
    say all this in sentences.
    """

    recipe: Recipe
    winner: Winner
    reasons: Mapping[str, str]
    float_time: Timing
    recipe_time: Timing
    mixture_time: Timing | None
    predicted_gain: float
    is_faster_than_float: bool
    profile: Profile
    notes: tuple[str, ...]
    _base: Recipe = field(repr=False)
    _values: Mapping[str, Any] = field(hash=False, repr=False)

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """The files of the recipe that was given."""
        return self._base.ingredients

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as a file that extends the given one.

        Raises ``RecipeReferenceError`` (QR001) if it cannot be written or would overwrite a file
        that is not a recipe.
        """
        save_overlay(self._base, self._values, Path(path_text(path, "save takes a path")))

    def _sections(self) -> Iterator[Section]:
        if self.reasons:
            rows = [tuple(each) for each in self.reasons.items()]
            yield Table("Left float", ("left float", "because"), rows)
        yield Text("Result", [*self.notes, *published(self.ingredients)])

    def _document(self) -> dict[str, Any]:
        names = ("winner", "is_faster_than_float", "reasons", "predicted_gain", "notes", "profile")
        return {
            **values_of(self, "ingredients", *names),
            "float": self.float_time,
            "given": self.recipe_time,
            "mixture": self.mixture_time,
            "recipe": self.recipe.to_toml(),
        }


def found(
    base: Recipe,
    profile: Profile,
    costs: Costs,
    members: Collection[str],
    mixture: Mixture,
    race: Race,
) -> Fastest:
    """The result of a race."""
    times = Timing.of(race.in_float), Timing.of(race.recipe)
    reasons: dict[str, str] = {}
    if race.winner == "mixture":
        reasons = reasons_of(costs, mixture.floats)
    elif race.winner == "float":
        movable = [site.name for site in costs.sites if site.int8 is not None]
        in_float, recipe = (ms(time.seconds) for time in times)
        whole = (
            f"float is {_as_fast(race)} here: the whole model takes {in_float} ms, "
            f"quantized {recipe} ms"
        )
        reasons = reasons_of(costs, movable, whole)
    mixed = None if race.mixture is None else Timing.of(race.mixture)
    notes = tuple(_notes(profile, mixture, race, len(reasons)))
    values = {
        "description": "\n".join(notes) + "\n",
        **overlay_values(reasons, members),
    }
    return Fastest(
        recipe=overlay_recipe(base, values),
        winner=race.winner,
        reasons=FrozenMapping(reasons),
        float_time=times[0],
        recipe_time=times[1],
        mixture_time=mixed,
        predicted_gain=mixture.gain,
        is_faster_than_float=race.speed.is_faster,
        profile=profile,
        notes=notes,
        _base=base,
        _values=values,
    )


def _notes(profile: Profile, mixture: Mixture, race: Race, left: int) -> Iterator[str]:
    yield _measured(mixture, race)
    if race.winner == "float":
        yield f"Nothing gains: float is {_as_fast(race)} here, so everything is left float."
    elif race.winner == "mixture":
        yield f"The recipe with {counted(left, 'site')} more in float is the fastest."
    elif race.mixture is not None:
        yield "No site is moved: more sites in float are not faster, beyond noise."
    elif mixture.failure is not None:
        yield f"No site is moved: more sites in float cannot be quantized: {mixture.failure}."
    else:
        yield f"No site is moved: no choice of sites is predicted to save {LEAST_GAIN:.0%}."
    if race.winner != "float":
        yield _against_float(race.speed)
    yield f"Measured with {profile.conditions.text}."


def _as_fast(race: Race) -> str:
    return "faster" if Speed.of(race.in_float, race.recipe).is_faster else "as fast"


def _against_float(speed: Speed) -> str:
    if speed.is_faster:
        return f"That is {speed.text} times as fast as float."
    if speed.is_equal:
        return "Even so, float is as fast here."
    return "It is unclear whether that is faster than float: the noise is larger."


def _measured(mixture: Mixture, race: Race) -> str:
    in_float, recipe = map(_with_spread, (race.in_float, race.recipe))
    text = f"Float takes {in_float}, the recipe as it is {recipe}"
    if race.mixture is None:
        return f"{text}."
    predicted = Timing.of(race.recipe).seconds * (1 - mixture.gain)
    mixed = _with_spread(race.mixture)
    return f"{text}, with more sites in float {mixed} ({ms(predicted)} ms by prediction)."


def _with_spread(seconds: Seconds) -> str:
    """The lower quartile, and how far the upper one is from it."""
    timing = Timing.of(seconds)
    return f"{ms(timing.seconds)} ms (+{ms(timing.spread)})"


Winner = Literal["recipe", "mixture", "float"]
"""The recipe as it was given, with more sites left float, or with all of them float."""


@dataclass(frozen=True, slots=True)
class Race:
    """The times of the float model, of the recipe as it is, and of a mixture if there is one."""

    in_float: Seconds
    recipe: Seconds
    mixture: Seconds | None = None

    @property
    def winner(self) -> Winner:
        """What to recommend: something other than the recipe only if that is faster.

        A mixture that is not faster than float by the middle of the rounds is float's win.
        """
        if Speed.of(self.in_float, self._best).is_faster:
            return "float"
        if self._best is self.recipe:
            return "recipe"
        return "float" if median(self.in_float) < median(self._best) else "mixture"

    @property
    def speed(self) -> Speed:
        """How many times as fast as the float model the recipe is, or the mixture."""
        return Speed.of(self._best, self.in_float)

    @property
    def _best(self) -> Seconds:
        """The mixture if it is faster than the recipe."""
        if self.mixture is not None and Speed.of(self.mixture, self.recipe).is_faster:
            return self.mixture
        return self.recipe


_HARDLY = 1.1


def reasons_of(
    costs: Costs, floats: Collection[str], otherwise: str | None = None
) -> dict[str, str]:
    """The reason of each site that needs a rule, the one that loses most in int8 first.

    What follows a float producer is float without a rule. ``otherwise`` is the reason of sites that
    are not slower in int8.
    """
    last = costs.in_channels_last(floats)
    named = costs.needing_a_rule(floats)
    found = []
    for site in costs.sites:
        if site.int8 is None or site.name not in named:
            continue
        in_float = site.channels_last if site.name in last else site.contiguous
        found.append((in_float - site.int8, site.name, _reason(site, in_float, otherwise)))
    return {name: reason for _, name, reason in sorted(found)}


def _reason(site: SitePrice, in_float: float, otherwise: str | None) -> str:
    assert site.int8 is not None
    what, against = site.precision, f"{ms(site.int8)} against {ms(in_float)} ms"
    if site.int8 > in_float * _HARDLY:
        return f"{what} is {_two_digits(site.int8 / in_float)} times slower here: {against}"
    if site.int8 > in_float:
        return f"{what} is not faster here: {against}"
    return (
        otherwise or f"{what} saves {ms(in_float - site.int8)} ms here, and converting costs more"
    )


def ms(seconds: float) -> str:
    """Milliseconds with two digits: ``8.4``, ``0.037``, ``120``."""
    return _two_digits(1000 * seconds)


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{float(f'{number:.2g}'):g}"


_FEWEST_ROUNDS = 30
_MOST_ROUNDS = 200
_ENOUGH = 3.0
"""Seconds for a race, unless the fewest rounds take longer."""


@neutral
@ranks.alone()
def fastest(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Fastest:
    """Find out which sites to leave float, so that the model is as fast as possible here.

    The model is profiled as by `qrecipe.profile`. A minimum cut finds the best choice for the times
    of sites and boundaries. If that choice is predicted to save 10 %, it is quantized and timed in
    turns with the given recipe and with the float model. The result is the given recipe unless one
    of the others is faster beyond noise.

    Times are measured as by `qrecipe.profile`, on the first batch. Accuracy is not considered; more
    sites in float usually lose less.

    Args:
        batches: as in `qrecipe.calibrate`.

    Raises what `qrecipe.profile` raises.
    """
    base = load_recipe(recipe)
    bench = bench_of(model, base, batches, forward, progress)
    profile = measured(bench, progress)
    costs = costs_of(profile, bench.plan, bench.inventory.structure)
    members = bench.plan.members
    mixture = mixture_of(costs)
    mixed = None
    if mixture.is_promising:
        values = overlay_values(reasons_of(costs, mixture.floats), members)
        try:
            with unwarned():  # the recipe as it is has given its warnings
                calibrated = replace(overlay_recipe(base, values), phase="ptq")
                mixed = quantize(model, calibrated, bench.held, forward=forward, progress=progress)
        except QRecipeError as error:
            mixture = replace(mixture, failure=error.findings[0].message)
    return found(base, profile, costs, members, mixture, race(bench, mixed, progress))


def race(bench: Bench, mixed: nn.Module | None, progress: Progress | bool | None) -> Race:
    """Time the float model, the recipe as it is and the mixture, if there is one, in turns."""
    models = [bench.eager, bench.converted, *([] if mixed is None else [mixed])]
    passes, show = (
        [Pass.of(each, bench.calls) for each in models],
        chosen_progress(progress, "comparing"),
    )
    with engine_of(bench.plan), torch.no_grad(), quiet():
        run_in_turn(twice(passes), _FEWEST_ROUNDS, _MOST_ROUNDS, _ENOUGH, show)
    return Race(*(each.whole for each in passes))
