"""The process-wide table of the classes that are registered in Python; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qrecipe.registry.arguments import Kind, Signature


@dataclass(frozen=True, slots=True)
class Registration:
    """A class registered under a name; ``options`` is the Pydantic model of its arguments."""

    name: str
    kind: Kind
    cls: type[Any]
    signature: Signature
    module: str
    options: type[BaseModel] | None = None


Table = Mapping[tuple[Kind, str], Registration]

_TABLE: dict[tuple[Kind, str], Registration] = {}


def find(kind: Kind, name: str) -> Registration | None:
    """The registration of that name, if any."""
    return _TABLE.get((kind, name))


def names(kind: Kind) -> tuple[str, ...]:
    """The registered names of one kind, sorted."""
    return tuple(sorted(name for of, name in _TABLE if of == kind))


def put(registration: Registration) -> None:
    """Add a registration, replacing an earlier one with the same name."""
    _TABLE[registration.kind, registration.name] = registration


def remove(kind: Kind, name: str) -> None:
    """Remove a registration; an unknown name is ignored."""
    _TABLE.pop((kind, name), None)


def snapshot() -> Table:
    """The current registrations."""
    return dict(_TABLE)


def restore(table: Table) -> None:
    """Undo what was registered since the `snapshot`."""
    _TABLE.clear()
    _TABLE.update(table)
