"""What orders the trials: the error and the time of each site, and the sets worth trying."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from qrecipe.authoring.fastest.costs import Costs
from qrecipe.authoring.fastest.cut import cheapest, mixture_of
from qrecipe.authoring.tune.blocks import Block, blocks_of
from qrecipe.authoring.tune.cheapest_sets import SiteCost, cheapest_sets, errors_of

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
