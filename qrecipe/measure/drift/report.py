"""The result of `qrecipe.drift`: stored ranges and those of today, worst first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qrecipe.audit.sqnr import db_text
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.measure.drift.distribution import Histogram
from qrecipe.measure.drift.stored_ranges import QRange
from qrecipe.measure.pages.sections import Bar, Bars
from qrecipe.measure.result import SiteResult
from qrecipe.recipe.recipe import Ingredient, published
from qrecipe.rules.resolution import listed
from qrecipe.terminal.report import Section, Table, Text, report_text, values_of

DEFAULT_THRESHOLD = 0.5
"""An end that moves by this much, in widths of the stored range, counts as drift."""

DEFAULT_MAX_CLIPPED = 0.05
"""More than the data of calibration give where an average clung to its first batch."""

FEWEST_VALUES = 1_000
"""A share of fewer values says little."""

_MOST_SHOWN = 10
"""Widths of the stored range beyond which it makes no difference how far a range moves."""


@dataclass(frozen=True, slots=True, repr=False)
class SiteDrift(ShortRepr):
    """One tensor that is quantized to a stored range: the output of a site, or a float input.

    Everything is measured on the float values at this point, which ``values`` counts. ``stored``
    and ``now`` are the ranges that calibration found and would find today; ``now`` is None if
    today's values give no range, for example because they are not finite. ``clipped`` is the share
    of values that the kernel cannot represent, ``outside`` the share beyond ``stored`` (smaller
    than what the kernel can represent with ``reduce_range``). ``sqnr_db`` estimates the SQNR after
    rounding and clipping to the stored range; None if values are not finite, or all zero.
    ``clipped_after`` and ``sqnr_after_db`` estimate the same for today's range.

    ``is_bound``: no float counterpart of the kernel is known, so its own outputs are counted.
    ``clipped`` and ``outside`` are upper bounds then, and both SQNR are None.
    """

    name: str
    op: str
    tensor: str
    dtype: str
    stored: QRange
    now: QRange | None
    values: Histogram | None = field(repr=False)
    is_finite: bool
    clipped: float
    clipped_after: float
    outside: float
    is_bound: bool
    sqnr_db: float | None
    sqnr_after_db: float | None

    @property
    def title(self) -> str:
        """The site and its tensor."""
        return f"{self.name} ({self.tensor})"

    @property
    def is_unseen(self) -> bool:
        """Whether no value was seen today."""
        return self.values is None and self.is_finite

    @property
    def moved(self) -> float:
        """How far recalibration would move the two ends, in widths of the stored range.

        Infinite if today's values give no range, 0 if there are none.
        """
        if self.now is None:
            return 0.0 if self.is_unseen else math.inf
        ends = abs(self.now.low - self.stored.low) + abs(self.now.high - self.stored.high)
        return ends / (self.stored.high - self.stored.low)

    @property
    def avoidable(self) -> float:
        """The share of values that recalibration would save from clipping.

        Zero if the shares are only bounds, or fewer than 1,000 values were seen.
        """
        seen = 0 if self.values is None else sum(self.values.counts)
        if self.is_bound or seen < FEWEST_VALUES:
            return 0.0
        return max(0.0, self.clipped - self.clipped_after)


@dataclass(frozen=True, slots=True, repr=False)
class Drift(SiteResult):
    """All stored ranges, first the one that recalibration would move most.

    ``ingredients`` are the files of the recipe.
    """

    sites: tuple[SiteDrift, ...]
    batches: int
    ingredients: tuple[Ingredient, ...] = ()

    def drifted(
        self, threshold: float = DEFAULT_THRESHOLD, *, max_clipped: float = DEFAULT_MAX_CLIPPED
    ) -> tuple[SiteDrift, ...]:
        """The tensors whose ``moved`` is above the threshold, or ``avoidable`` above the other."""
        return tuple(
            site for site in self.sites if site.moved > threshold or site.avoidable > max_clipped
        )

    def text(
        self, threshold: float = DEFAULT_THRESHOLD, *, max_clipped: float = DEFAULT_MAX_CLIPPED
    ) -> str:
        """The table, and how many tensors are above a threshold."""
        return report_text(self._sections(threshold, max_clipped))

    def _sections(
        self, threshold: float = DEFAULT_THRESHOLD, max_clipped: float = DEFAULT_MAX_CLIPPED
    ) -> Iterator[Section]:
        yield Table(
            "Stored ranges",
            _HEADER,
            [_row(site) for site in self.sites],
            "clipped: values beyond all integers of the kernel; dB: SQNR that the stored range "
            "leaves of what float gives here (estimate); after: the same for the range of today.",
            numeric=frozenset(range(2, len(_HEADER))),
        )
        summary = self.summary(threshold, max_clipped)
        yield Text("Result", [*summary, *published(self.ingredients)])

    def summary(self, threshold: float, max_clipped: float) -> tuple[str, ...]:
        """How many tensors are above a threshold, and what that means, in sentences."""
        above = len(self.drifted(threshold, max_clipped=max_clipped))
        lines = [
            f"{above} of {counted(len(self.sites), 'stored range')} drifted over "
            f"{counted(self.batches, 'batch')}.",
            f"A range has drifted if recalibration would move it by more than "
            f"{_percent(threshold)} of its width, or save more than {_percent(max_clipped)} of its "
            "values from clipping.",
        ]
        unbounded = [site.title for site in self.sites if not site.is_finite]
        if unbounded:
            lines.append(f"Tensors with values that are not finite: {listed(unbounded)}.")
        return tuple(lines)

    def _document(self) -> dict[str, Any]:
        measured = (
            *("name", "op", "tensor", "dtype", "stored", "now", "moved", "outside", "clipped"),
            *("clipped_after", "is_bound", "is_finite", "sqnr_db", "sqnr_after_db"),
        )
        sites = [
            {
                **values_of(site, *measured),
                "observed": site.values and values_of(site.values, "low", "high"),
            }
            for site in self.sites
        ]
        return {**values_of(self, "ingredients", "batches"), "sites": sites}

    def _bars(self) -> Sequence[Bars]:
        bars = [Bar(site.title, moved_text(site), (_drawn_move(site),)) for site in self.sites]
        length = "how far recalibration moves the two ends, in widths of the stored range"
        return [Bars("Ranges by how far they would move", bars, length)]


_HEADER = (
    *("site", "tensor", "stored range", "range today", "moved"),
    *("clipped", "clipped after", "dB", "dB after"),
)


def _row(site: SiteDrift) -> tuple[str, ...]:
    bound = "≤" if site.is_bound else ""
    return (
        site.name,
        site.tensor,
        _range_text(site.stored),
        _range_of_today(site),
        moved_text(site),
        f"{bound}{site.clipped:.2%}",
        "" if site.now is None else f"{site.clipped_after:.2%}",
        "" if site.sqnr_db is None else db_text(site.sqnr_db),
        "" if site.sqnr_after_db is None else db_text(site.sqnr_after_db),
    )


def moved_text(site: SiteDrift) -> str:
    """How far a range would move, in percent of its width."""
    return f"{site.moved:.0%}" if site.moved <= _MOST_SHOWN else f">{_MOST_SHOWN:.0%}"


def _drawn_move(site: SiteDrift) -> float:
    """How far a range would move, limited so that one bar does not dwarf the others."""
    return min(site.moved, _MOST_SHOWN)


def worst_first(site: SiteDrift) -> tuple[float, float]:
    """The sort key of tensors: the furthest move first, then the most clipped."""
    return -site.moved, -site.clipped


def _range_of_today(site: SiteDrift) -> str:
    if site.is_unseen:
        return "no values"
    if not site.is_finite:
        return "not finite"
    return "none" if site.now is None else _range_text(site.now)


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _range_text(of: QRange) -> str:
    return f"{of.low:.4g} .. {of.high:.4g}"
