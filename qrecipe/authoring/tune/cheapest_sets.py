"""Which sites to leave float for the least time, by an estimate that orders what is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrecipe.errors.short import ShortRepr

_GRAIN = 256
"""How finely the time is divided."""


@dataclass(frozen=True, slots=True, repr=False)
class SiteCost(ShortRepr):
    """A site that could stay float: why, and its share of the float model's time, 0 to 1.

    ``sqnr_db`` is that of the output with this site alone quantized; None where it is not finite,
    or where the output holds no floating tensor and the accuracy ranked the sites.
    """

    name: str
    reason: str
    share: float
    sqnr_db: float | None


def errors_of(costs: Sequence[SiteCost]) -> dict[str, float]:
    """What each site adds to the squared error of the output, the most sensitive first.

    Errors of sites add up as powers do where they are independent. Sites that have no SQNR go by
    their place: 1, 1/2, 1/3, ...
    """
    if all(cost.sqnr_db is None for cost in costs):
        return {cost.name: 1 / place for place, cost in enumerate(costs, 1)}
    found: dict[str, float] = {}
    behind = 0.0
    for cost in reversed(costs):
        if cost.sqnr_db is not None:
            behind = 10.0 ** (-cost.sqnr_db / 10)
        found[cost.name] = behind  # one without a finite SQNR is at least as bad as the next
    return {cost.name: found[cost.name] for cost in costs}


def cheapest_sets(
    errors: Mapping[str, float], shares: Mapping[str, float]
) -> Sequence[frozenset[str]]:
    """Sets of sites by growing time; each takes away more error than any that takes less.

    The knapsack problem, by dynamic programming over the time in 256 parts, at least one of them
    for each site. Among equals the more sensitive sites are taken.
    """
    total = sum(shares[name] for name in errors)
    parts = {name: max(1, round(_GRAIN * _ratio(shares[name], total))) for name in errors}
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


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
