"""What installed distributions publish by entry points, read from their metadata alone.

A claim is an entry point of the group `qrecipe.plugins`: ``observer.NAME``, ``fake_quant.NAME`` or
``transform.NAME`` -> the module that registers it, which `observers.loading` imports once a recipe
names it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import get_args

from qrecipe.registry.arguments import Kind


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One entry point of a distribution."""

    name: str
    value: str
    distribution: str
    version: str


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of one group, sorted, without distributions whose metadata is damaged.

    `importlib.metadata.entry_points` fails altogether if one cannot be read.
    """
    return _entry_points(group, tuple(map(_state, sys.path)))


def _state(folder: str) -> tuple[str, int]:
    """A folder of ``sys.path`` and when something was last installed into it."""
    try:
        return folder, Path(folder or ".").stat().st_mtime_ns
    except (OSError, ValueError):
        return folder, 0


@lru_cache(maxsize=8)
def _entry_points(group: str, _: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for installed in distributions():
        points = tuple(_read(installed, group))
        if points:
            name = re.sub("[-_.]+", "-", points[0].distribution).lower()
            found.setdefault(name, points)
    every = (point for points in found.values() for point in points)
    return tuple(sorted(every, key=lambda point: (point.distribution, point.name, point.value)))


def _read(installed: Distribution, group: str) -> Iterator[EntryPoint]:
    try:
        text = installed.read_text("entry_points.txt") or ""
        if group not in text:
            return
        name, version = installed.metadata["Name"], installed.version
        points = dict.fromkeys(installed.entry_points)
        is_shadowed = distribution(name).read_text("entry_points.txt") != text
    except Exception:  # the parsers may raise anything on a damaged file
        return
    if version and not is_shadowed:  # by one with the same name earlier on the path
        for point in points:
            if point.group == group:
                yield EntryPoint(point.name, point.value, name, version)


ENTRY_POINT_GROUP = "qrecipe.plugins"

PLAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""The valid names of what can be registered."""


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
