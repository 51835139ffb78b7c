"""What `qrecipe.drift` found: stored ranges beside those of today, the worst first."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from qrecipe.measure.distribution import Histogram
from qrecipe.measure.fidelity import finite_or_none
from qrecipe.measure.stored import QRange
from qrecipe.recipe import Ingredient, published
from qrecipe.tables import render_table

DEFAULT_THRESHOLD = 0.5
"""A range that ends in the middle of the stored one, or half of its width beyond it."""


@dataclass(frozen=True, slots=True)
class SiteDrift:
    """One tensor that is quantized to a stored range: the output of a site, or a float input.

    ``stored`` and ``now`` hold the real values for which the recipe's integers were chosen; ``now``
    is None where today's values give no range, for they are not finite. ``clipped`` is the share
    of values that the kernel cannot represent, ``outside`` of those beyond ``stored``: with
    ``reduce_range`` the kernels have integers to spare. ``is_bound`` tells that no float
    counterpart of the kernel is known: the shares are then lower bounds, taken from the ends of
    what it gave, and ``sqnr_db`` is None. ``sqnr_db`` is that of rounding and clipping here alone;
    ``sqnr_after_db`` an estimate of what the range of today would give. ``values`` counts today's.
    """

    name: str
    op: str
    tensor: str
    dtype: str
    stored: QRange
    now: QRange | None
    values: Histogram | None = field(repr=False)
    clipped: float
    outside: float
    is_bound: bool
    sqnr_db: float | None
    sqnr_after_db: float | None

    @property
    def moved(self) -> float:
        """How far recalibration would move the two ends, in widths of the stored range.

        Infinite where today's data give no range.
        """
        if self.now is None:
            return math.inf
        ends = abs(self.now.low - self.stored.low) + abs(self.now.high - self.stored.high)
        return ends / (self.stored.high - self.stored.low)


@dataclass(frozen=True, slots=True)
class Drift:
    """All stored ranges, first the one that recalibration would move most.

    ``ingredients`` are the files that the recipe was made of.
    """

    sites: tuple[SiteDrift, ...]
    batches: int
    ingredients: tuple[Ingredient, ...] = ()

    def drifted(self, threshold: float = DEFAULT_THRESHOLD) -> tuple[SiteDrift, ...]:
        """The tensors whose ``moved`` is above the threshold."""
        return tuple(site for site in self.sites if site.moved > threshold)

    def __str__(self) -> str:
        return self.text()

    def text(self, threshold: float = DEFAULT_THRESHOLD) -> str:
        """The table, and how many tensors are above the threshold."""
        header = ("site", "tensor", "stored range", "range today", "moved", "outside", "clipped")
        table = render_table((*header, "dB", "dB after"), [drift_row(s) for s in self.sites])
        count = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        above = len(self.drifted(threshold))
        summary = (
            f"{len(self.sites)} stored ranges over {count}; recalibration would move "
            f"{above} by more than {threshold:.0%} of their width"
        )
        return "\n".join([table, "", summary, *published(self.ingredients)])

    def to_json(self) -> str:
        """Stable keys; what is not finite is null."""
        return json.dumps(drift_json(self), indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """How far each range would move, as an image of the type that ``path`` names.

        Raises ``QRecipeError``: matplotlib is missing (QR602), the file cannot be written (QR421).
        """
        from qrecipe.measure.plots import plot_bars

        label = "how far recalibration moves the ends, in widths of the stored range"
        names = [f"{site.name} ({site.tensor})" for site in self.sites]
        plot_bars(names, [site.moved for site in self.sites], label, path)


def drift_json(report: Drift) -> dict[str, Any]:
    """A report of drift as plain values."""
    return {
        "ingredients": [each.to_json() for each in report.ingredients],
        "batches": report.batches,
        "sites": [
            {
                "name": site.name,
                "op": site.op,
                "tensor": site.tensor,
                "dtype": site.dtype,
                "stored": _range_json(site.stored),
                "now": None if site.now is None else _range_json(site.now),
                "observed": None
                if site.values is None
                else {"low": site.values.low, "high": site.values.high},
                "moved": finite_or_none(site.moved),
                "outside": site.outside,
                "clipped": site.clipped,
                "is_bound": site.is_bound,
                "sqnr_db": finite_or_none(site.sqnr_db),
                "sqnr_after_db": site.sqnr_after_db,
            }
            for site in report.sites
        ],
    }


def drift_row(site: SiteDrift) -> tuple[str, ...]:
    """A line of the table."""
    bound = "≥" if site.is_bound else ""
    return (
        site.name,
        site.tensor,
        _range_text(site.stored),
        "none" if site.now is None else _range_text(site.now),
        f"{site.moved:.0%}" if math.isfinite(site.moved) else "all",
        f"{bound}{site.outside:.2%}",
        f"{bound}{site.clipped:.2%}",
        _db(site.sqnr_db),
        "" if site.sqnr_after_db is None else f"~{site.sqnr_after_db:.1f}",
    )


def worst_first(site: SiteDrift) -> tuple[float, float]:
    """The key that sorts tensors: the farthest move first, of equal ones the most clipped."""
    return -site.moved, -site.clipped


def _db(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f}"


def _range_text(of: QRange) -> str:
    return f"{of.low:.4g} .. {of.high:.4g}"


def _range_json(of: QRange) -> dict[str, Any]:
    return {"scale": of.scale, "zero_point": of.zero_point, "low": of.low, "high": of.high}
