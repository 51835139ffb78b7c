"""The blocks of a model: modules that hold several sites."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from qrecipe.rules.structure import enclosing


@dataclass(frozen=True, slots=True)
class Block:
    """The sites in a module, and the seconds that leaving them float is predicted to cost."""

    path: str
    sites: frozenset[str]
    seconds: float


def blocks_of(names: Collection[str]) -> dict[str, frozenset[str]]:
    """The blocks that sites are in, by path, in the order of the sites.

    A block is as large as it can be without holding two others, so no two have a site in common: an
    inverted residual with its sum, and not the stage that it is in. Sites may be in none.
    """
    inside = defaultdict[str, set[str]](set)
    for name in names:
        for path in _scopes(name):
            inside[path].add(name)
    several = {path: frozenset(sites) for path, sites in inside.items() if len(sites) > 1}
    around = {enclosing(path)[1] for path in several if path}
    held = Counter(outer for path in several if path not in around for outer in enclosing(path))
    return {
        path: sites
        for path, sites in several.items()
        if path and held[path] == 1 and (held[enclosing(path)[1]] > 1 or not enclosing(path)[1])
    }


def _scopes(name: str) -> tuple[str, ...]:
    """The modules around a site, itself included: ``a.b:add#1`` -> ``a.b``, ``a``, ``""``."""
    return enclosing(name.partition(":")[0].partition("#")[0])
