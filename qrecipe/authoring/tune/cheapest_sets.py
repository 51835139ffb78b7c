"""Which sites to leave float at the lowest cost in time, by an estimate that orders the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrecipe.errors.short import ShortRepr

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
    behind = 0.0
    for cost in reversed(costs):
        if cost.sqnr_db is not None:
            behind = 10.0 ** (-cost.sqnr_db / 10)
        found[cost.name] = behind  # without a finite SQNR: at least as bad as the next
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
