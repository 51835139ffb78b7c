"""The result: the fastest recipe that was measured, and what it was compared with."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qrecipe.authoring.fastest.costs import Costs
from qrecipe.authoring.fastest.cut import LEAST_GAIN, Mixture
from qrecipe.authoring.fastest.guard import Race, Winner
from qrecipe.authoring.fastest.reasons import ms, reasons_of
from qrecipe.errors.text import counted
from qrecipe.measure.profile.report import Profile, profile_json
from qrecipe.measure.profile.timing import Timing
from qrecipe.measure.turns import Seconds, Speed
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.overlay import float_rules, overlay_recipe, rule_key, save_overlay
from qrecipe.recipe.recipe import Ingredient, Recipe, published
from qrecipe.recipe.references import path_text
from qrecipe.terminal.report import Report, Section, Table, Text


@dataclass(frozen=True, slots=True, repr=False)
class Fastest(Report):
    """The fastest of the recipe as it is, a mixture with more sites float, and float.

    ``winner`` tells which it is, and ``recipe`` extends the given one accordingly. ``reasons`` has
    the sites that it leaves float for speed, the greatest loss first. The times are of whole
    models, measured in turns; ``mixture_time`` is None if no mixture was worth measuring.
    ``predicted_gain`` is the share of the recipe's time that the best mixture saves by prediction.
    ``is_faster_than_float`` tells whether the result is, beyond noise. ``notes`` say all this in
    sentences.
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

    def to_json(self) -> str:
        """JSON with stable keys, times in seconds; the recipe is TOML text."""
        return json.dumps(fastest_json(self), indent=2)


def fastest_json(result: Fastest) -> dict[str, Any]:
    """A result as plain values."""
    mixture = result.mixture_time
    return {
        "ingredients": [each.to_json() for each in result.ingredients],
        "winner": result.winner,
        "is_faster_than_float": result.is_faster_than_float,
        "reasons": dict(result.reasons),
        "float": asdict(result.float_time),
        "given": asdict(result.recipe_time),
        "mixture": None if mixture is None else asdict(mixture),
        "predicted_gain": result.predicted_gain,
        "notes": list(result.notes),
        "profile": profile_json(result.profile),
        "recipe": result.recipe.to_toml(),
    }


def overlay_values(reasons: Mapping[str, str], members: Collection[str]) -> dict[str, Any]:
    """The rules of an overlay that leaves sites float; ``members`` are all calls of the model."""
    rules = {rule_key(name, members): reason for name, reason in reasons.items()}
    return float_rules(rules) if rules else {}


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
        yield "Nothing is moved: more sites in float are not faster, beyond noise."
    elif mixture.failure is not None:
        yield f"Nothing is moved: more sites in float cannot be quantized: {mixture.failure}."
    else:
        yield f"Nothing is moved: no choice of sites saves {LEAST_GAIN:.0%} by prediction."
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
    return "Whether that is faster than float was not to be seen: the noise is larger."


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
