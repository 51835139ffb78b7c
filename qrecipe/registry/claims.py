"""The names that installed distributions claim for their observers and fake-quants; torch-free.

A claim is an entry point in the group `qrecipe.plugins`: ``observer.NAME`` or ``fake_quant.NAME``
-> the module that registers it. The module is only imported when a recipe uses the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from qrecipe.registry.arguments import Kind
from qrecipe.registry.entry_points import EntryPoint, entry_points

ENTRY_POINT_GROUP = "qrecipe.plugins"

PLAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""The valid names of observers and fake-quants."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A name, the module that registers it, and the distribution that claims it."""

    kind: Kind
    name: str
    module: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def claims(kind: Kind, name: str) -> tuple[Claim, ...]:
    """The claims of a name; several contradict each other."""
    return tuple(claim for claim in every_claim() if (claim.kind, claim.name) == (kind, name))


def claimed_names(kind: Kind) -> tuple[str, ...]:
    """The claimed names, sorted."""
    return tuple(sorted({claim.name for claim in every_claim() if claim.kind == kind}))


def every_claim() -> tuple[Claim, ...]:
    """All claims, by distribution."""
    return tuple(
        claim for point in entry_points(ENTRY_POINT_GROUP) if (claim := _claim(point)) is not None
    )


def misnamed() -> tuple[EntryPoint, ...]:
    """The entry points of the group without a valid kind or name."""
    return tuple(point for point in entry_points(ENTRY_POINT_GROUP) if _claim(point) is None)


def _claim(point: EntryPoint) -> Claim | None:
    before, _, name = point.name.partition(".")
    for kind in get_args(Kind):
        if before == kind and PLAIN_NAME.fullmatch(name):
            return Claim(kind, name, point.value, point.distribution, point.version)
    return None
