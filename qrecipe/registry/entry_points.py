"""Entry points of installed distributions, read from metadata without importing anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path


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
            found.setdefault(_normalized(points[0].distribution), points)
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


def _normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()
