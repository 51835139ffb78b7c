"""What was measured or searched, as a report and as JSON."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from qrecipe.errors.text import finite_or_none
from qrecipe.terminal.report import Report


class Result(Report):
    """A report that is also written as JSON."""

    __slots__ = ()

    @abstractmethod
    def _document(self) -> dict[str, Any]:
        """What `to_json` writes, as `plain` takes it."""

    def to_json(self) -> str:
        """JSON with stable keys: times are in seconds, recipes TOML text.

        Numbers that are not finite are null. An infinite SQNR has ``"exact": true`` beside it.
        """
        return json.dumps(plain(self), indent=2)


def values_of(value: object, *names: str) -> dict[str, Any]:
    """Some attributes of a value, by their names."""
    return {name: getattr(value, name) for name in names}


def plain(value: Any) -> Any:
    """A value as JSON has it; a dataclass is what its own `to_json` gives, or its fields."""
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    if isinstance(value, Result):
        return plain(value._document())
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return plain(values_of(value, *(each.name for each in fields(value))))
    return value
