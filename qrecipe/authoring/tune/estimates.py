"""What orders the trials: the error and the time of each site, and the sets worth trying."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from qrecipe.authoring.fastest.costs import Costs
from qrecipe.authoring.fastest.cut import cheapest, mixture_of
from qrecipe.errors.short import ShortRepr
from qrecipe.rules.structure import enclosing

_MOST_CUTS = 20
_NO_COSTS = Costs((), ())


@dataclass(frozen=True, slots=True)
class Estimates:
    """The sites that could stay float, the most sensitive first, and what a choice of them costs.

    Nothing here is relied on: it only decides what is tried first.
    """

    ranking: tuple[SiteCost, ...] = ()
    costs: Costs = _NO_COSTS

    @property
    def ranked(self) -> tuple[str, ...]:
        """The names in the ranking."""
        return tuple(site.name for site in self.ranking)

    def is_all_float(self, floats: Collection[str]) -> bool:
        """Whether nothing of the ranking is left in int8: the float model, and not a solution."""
        return set(floats).issuperset(self.ranked)

    def faster_float(self) -> frozenset[str]:
        """The sites to leave float for speed alone: if that pays, and others stay int8."""
        mixture = mixture_of(self.costs)
        pays = mixture.is_promising and not self.is_all_float(mixture.floats)
        return self.costs.needing_a_rule(mixture.floats) if pays else frozenset()

    def prices(self, base: Collection[str]) -> dict[str, float]:
        """What leaving each ranked site float costs if others are, in seconds; 0 for a gain."""
        before = self.costs.predicted(base)
        return {
            name: max(0.0, self.costs.predicted({*base, name}) - before) for name in self.ranked
        }

    def blocks(self) -> Sequence[Block]:
        """The blocks of the model, the one with the most error for its time first."""
        base, errors = self.faster_float(), errors_of(self.ranking)
        before = self.costs.predicted(base)
        found = [
            Block(path, sites, max(0.0, self.costs.predicted(base | sites) - before))
            for path, sites in blocks_of(self.ranked).items()
        ]

        def error_for_time(block: Block) -> float:
            error = math.fsum(errors[name] for name in block.sites)
            return error / block.seconds if block.seconds else math.inf

        return sorted(found, key=error_for_time, reverse=True)

    def sets(self) -> Sequence[frozenset[str]]:
        """Sets of float sites by increasing time; each removes more error than any faster one.

        They are the solutions of the knapsack problem, which adds up what each site costs alone,
        and minimum cuts, which know what neighbours save together but only find the convex hull.
        """
        return _sets(self)

    def _cuts(self, errors: Mapping[str, float]) -> Iterator[frozenset[str]]:
        """Choices with the least time plus error, for prices of the error between any two.

        None without boundaries: the knapsack is exact for sites that do not depend on each other.
        """
        if not self.costs.tensors:
            return
        fast = self._point(cheapest(self.costs), errors)
        gaps = deque([(fast, self._point(self.ranked, errors))])
        yield frozenset(fast.floats)
        for _ in range(_MOST_CUTS):
            if not gaps:
                return
            fast, exact = gaps.popleft()
            if exact.error >= fast.error:
                continue
            price = (exact.seconds - fast.seconds) / (fast.error - exact.error)
            penalties = {name: price * error for name, error in errors.items()}
            new = self._point(cheapest(self.costs.with_penalties(penalties), 0.0), errors)
            if new not in (fast, exact):
                gaps += [(fast, new), (new, exact)]
                yield frozenset(new.floats)

    def _point(self, names: Collection[str], errors: Mapping[str, float]) -> _Point:
        floats = self.costs.with_followers(names)
        error = math.fsum(error for name, error in errors.items() if name not in floats)
        rules = tuple(sorted(self.costs.needing_a_rule(floats)))
        return _Point(self.costs.predicted(floats), error, rules)


@lru_cache(maxsize=4)
def _sets(estimates: Estimates) -> Sequence[frozenset[str]]:
    """Solved once: a search that looks ahead comes here again and again."""
    errors = errors_of(estimates.ranking)
    base = estimates.faster_float()
    others = {name: error for name, error in errors.items() if name not in base}
    packed = {base, *(base | s for s in cheapest_sets(others, estimates.prices(base)))}
    found: list[frozenset[str]] = []
    least = estimates._point((), errors).error
    for point in sorted(
        estimates._point(names, errors) for names in packed | {*estimates._cuts(errors)}
    ):
        if point.error < least and not estimates.is_all_float(point.floats):
            least = point.error
            found.append(frozenset(point.floats))
    return found


class _Point(NamedTuple):
    """A choice of float sites: the predicted seconds, and the error that is left."""

    seconds: float
    error: float
    floats: tuple[str, ...]


_GRAIN = 256
"""The number of parts that the time is divided into."""


@dataclass(frozen=True, slots=True, repr=False)
class SiteCost(ShortRepr):
    """A site that could stay float: why, and its share of the float model's time, 0 to 1.

    ``sqnr_db`` is that of the output with only this site quantized; None if it is not finite, or
    if the output has no floating tensor and the sites were ranked by accuracy.
    """

    name: str
    reason: str
    share: float
    sqnr_db: float | None


def errors_of(costs: Sequence[SiteCost]) -> dict[str, float]:
    """What each site adds to the squared error of the output, the most sensitive first.

    The errors of sites are taken to be independent, so their energies add up. Sites without an
    SQNR count by rank: 1, 1/2, 1/3, ...
    """
    if all(cost.sqnr_db is None for cost in costs):
        return {cost.name: 1 / place for place, cost in enumerate(costs, 1)}
    found: dict[str, float] = {}
    error = 0.0
    for cost in reversed(costs):
        if cost.sqnr_db is not None:
            error = 10.0 ** (-cost.sqnr_db / 10)
        found[cost.name] = error  # without a finite SQNR: at least as bad as the next
    return {cost.name: found[cost.name] for cost in costs}


def cheapest_sets(
    errors: Mapping[str, float], shares: Mapping[str, float]
) -> Sequence[frozenset[str]]:
    """Sets of sites by increasing time; each removes more error than any cheaper one.

    Solves the knapsack problem by dynamic programming over the time in 256 parts, at least one per
    site. Of equal sets, the one with more sensitive sites wins.
    """
    total = sum(shares[name] for name in errors) or 1.0
    parts = {name: max(1, round(_GRAIN * shares[name] / total)) for name in errors}
    best: list[tuple[float, frozenset[str]]] = [(0.0, frozenset())] * (sum(parts.values()) + 1)
    for name, error in errors.items():
        for time in range(len(best) - 1, parts[name] - 1, -1):
            removed, names = best[time - parts[name]]
            if removed + error > best[time][0]:
                best[time] = (removed + error, names | {name})
    found: list[frozenset[str]] = []
    least = 0.0
    for removed, names in best:
        if removed > least:
            least = removed
            found.append(names)
    return found


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
        for path in enclosing(name.partition(":")[0].partition("#")[0]):
            inside[path].add(name)
    several = {path: frozenset(sites) for path, sites in inside.items() if len(sites) > 1}
    around = {enclosing(path)[1] for path in several if path}
    held = Counter(outer for path in several if path not in around for outer in enclosing(path))
    return {
        path: sites
        for path, sites in several.items()
        if path and held[path] == 1 and (held[enclosing(path)[1]] > 1 or not enclosing(path)[1])
    }
