"""Two recipes compared by the values that they set and by their effect on a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qrecipe.errors.findings import Location, UnknownNameError
from qrecipe.recipe.layers import significant
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.toml.writer import toml_key, toml_value


@dataclass(frozen=True, slots=True)
class Value:
    """A value as TOML writes it, and where it was set."""

    text: str
    location: Location | None


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A key that two recipes set differently; None if one of them does not set it."""

    key: str
    before: Value | None
    after: Value | None


def value_changes(before: Recipe, after: Recipe) -> Iterator[ValueChange]:
    """The differences of two recipes with their bases merged, in the order of the first.

    Descriptions and reasons don't count: there are no changes if and only if the fingerprints are
    equal.
    """
    old, new = (significant(each.settings.items()) for each in (before, after))
    for path in {**old, **new}:
        if path not in old or path not in new or _canonical(old[path]) != _canonical(new[path]):
            key = ".".join(map(toml_key, path))
            yield ValueChange(
                key,
                _value(before, key, old[path]) if path in old else None,
                _value(after, key, new[path]) if path in new else None,
            )


def _canonical(value: Any) -> str:
    """As in fingerprints, where 1 and 1.0 are two values."""
    return json.dumps(value, sort_keys=True, default=str)


def _value(recipe: Recipe, key: str, value: Any) -> Value:
    try:
        return Value(_text(value), recipe.origin(key))
    except UnknownNameError:
        return Value(_text(value), None)


def _text(value: Any) -> str:
    """The short form of a rule or constructor if it has one."""
    if isinstance(value, Mapping) and value.keys() in ({"name"}, {"qconfig"}):
        (value,) = value.values()
    return toml_value(value)
