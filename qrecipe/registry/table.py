"""The process-wide table of the observers and fake-quants that were registered in Python.

Torch-free, so that a recipe can be checked against it; `registry` fills it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qrecipe.registry.arguments import Kind, Signature


@dataclass(frozen=True, slots=True)
class Registration:
    """A class under a name, registered by a module.

    ``options`` is the Pydantic model of its arguments, if it has one.
    """

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
    """Enter a registration, in place of an earlier one of the same name."""
    _TABLE[registration.kind, registration.name] = registration


def remove(kind: Kind, name: str) -> None:
    """Forget a registration; a name that is not registered is no error."""
    _TABLE.pop((kind, name), None)


def snapshot() -> Table:
    """All registrations as they are now."""
    return dict(_TABLE)


def restore(table: Table) -> None:
    """Take back what was registered since the `snapshot`."""
    _TABLE.clear()
    _TABLE.update(table)
