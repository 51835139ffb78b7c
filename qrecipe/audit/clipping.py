"""How much of the calibration data the calibrated ranges clip, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from qrecipe._torch_ao import ObserverBase
from qrecipe.audit.farthest_call import Call, Candidates, outside
from qrecipe.audit.moving_averages import Average, Averages, Extremes, span
from qrecipe.audit.ranges import static_observers
from qrecipe.audit.rounding import code_range, minmax, rounded_db, side_by_side_db
from qrecipe.audit.sample import JUDGEABLE_DB, Sample
from qrecipe.errors.findings import Finding

LEAST_GAIN_DB = 6.0
"""The least gain of "minmax" on one batch (about one bit) that is worth a warning."""

GOOD_DB = 20.0
"""An output this close to float needs no better ranges."""

BAD_DB = 8.0
"""Below this, two fifths of an output are noise: worth a warning even with many batches."""

_MARGIN_DB = 3.0
"""How much the samples that go furthest may differ from their batch."""

_LEAST_SHARE = 0.01
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Clipped:
    """A site, the range that it keeps, and the range that calibration saw."""

    site: str
    kept: Extremes
    seen: Extremes

    @property
    def share(self) -> float:
        """The clipped part of the range that was seen (zero included), 0 to 1."""
        return outside(self.kept, self.seen) / (span(self.seen) or 1.0)

    @property
    def extent(self) -> str:
        """The share and the two ranges, in words."""
        (low, high), (lowest, highest) = self.kept, self.seen
        kept = f"keeping {low:.3g} to {high:.3g} of {lowest:.3g} to {highest:.3g}"
        return f"by {self.share:.0%} ({kept})"


@dataclass(frozen=True, slots=True)
class Cost:
    """The output's SQNR in dB with rounded activations, on the first and the furthest batch."""

    batch: int
    first_db: float
    farthest_db: float
    minmax: tuple[float, float]

    @property
    def gain_db(self) -> float:
        """What "minmax" gains on the worse batch: one loud batch must not cost the others."""
        return min(self.minmax) - min(self.first_db, self.farthest_db)

    def __str__(self) -> str:
        first, farthest = self.minmax
        return (
            f"the output has {self.first_db:.1f} dB on the first batch and {self.farthest_db:.1f} "
            f'dB on batch {self.batch}, with "minmax" {first:.1f} and {farthest:.1f} dB'
        )


@dataclass(frozen=True, slots=True)
class Clipping:
    """The sites that clip, worst first, and the cost; no sites where it costs little.

    ``is_narrow``: a moving average ended far narrower than most batches. ``beginning`` says in
    words what the moving averages (if any) started from and its weight.
    """

    clipped: tuple[Clipped, ...]
    cost: Cost | None
    is_narrow: bool
    beginning: str | None

    def shows_below(self, limit: float) -> bool:
        """Whether some batch is below ``limit`` dB and "minmax" would help it."""
        cost = self.cost
        return cost is not None and cost.farthest_db < limit and cost.gain_db >= LEAST_GAIN_DB

    @property
    def is_hidden(self) -> bool:
        """Whether a batch is bad although the first one, which the audit checks, is fine."""
        if self.cost is None or self.cost.first_db < JUDGEABLE_DB:
            return False
        return self.shows_below(BAD_DB)

    def __str__(self) -> str:
        first = [f"{each.site} is clipped {each.extent}" for each in self.clipped[:1]]
        others = [f"{each.site} {each.extent}" for each in self.clipped[1:_MOST_NAMED]]
        told = ", ".join([*first, *others])
        if len(self.clipped) > _MOST_NAMED:
            told += f" and {len(self.clipped) - _MOST_NAMED} more"
        return told if self.cost is None else f"{told}; {self.cost}"


def clipping_of(
    parts: Mapping[str, fx.GraphModule],
    averages: Averages,
    batches: int,
    candidates: Mapping[fx.GraphModule, Candidates],
    first: Mapping[str, Sample],
) -> Clipping:
    """What the calibrated ranges clip, and its cost where that is high.

    Observers that are called several times per batch are left to `joined_ranges` and
    `around_roots`.
    """
    seen = _seen(parts.values(), averages, batches)
    costs = [
        cost
        for path, part in parts.items()
        if part in candidates
        and (farthest := candidates[part].farthest())
        and (cost := _cost(part, seen, first[path], farthest))
    ]
    averaging = [averages[observer] for observer in seen if observer in averages]
    narrow = any(average.is_narrow() for average in averaging)
    return Clipping(
        tuple(_clipped(parts.values(), seen)) if costs or narrow else (),
        max(costs, key=lambda cost: cost.gain_db, default=None),
        narrow,
        _beginning(averaging[0], batches) if averaging else None,
    )


def clipping_finding(clipping: Clipping) -> Finding:
    """The warning about ranges that clip (QR232, QR233)."""
    if clipping.beginning is None:
        return Finding(
            "QR233",
            f"the ranges clip values that calibration saw: {clipping}",
            hint='observe with "minmax", which clips nothing',
        )
    return Finding(
        "QR232",
        f"the moving averages depend too much on {clipping.beginning}: {clipping}",
        hint='observe with "minmax", which clips nothing; or shuffle the batches, use more of '
        "them, or a larger averaging_constant",
    )


def _beginning(average: Average, batches: int) -> str:
    what = "what was observed before" if average.is_continued else f"the first of {batches} batches"
    return f"{what}, which weighs {average.first_weight:.0%}"


def _seen(
    parts: Iterable[fx.GraphModule], averages: Averages, batches: int
) -> dict[ObserverBase, Extremes]:
    """What each observer saw, if it keeps its extremes or its average tells them."""
    seen: dict[ObserverBase, Extremes] = {}
    for part in parts:
        for _, observer in static_observers(part):
            average = averages.get(observer)
            if average is None:
                extremes = _extremes(observer)
            else:
                extremes = average.seen() if average.calls == batches else None
            if extremes is not None:
                seen[observer] = extremes
    return seen


def _clipped(
    parts: Iterable[fx.GraphModule], seen: Mapping[ObserverBase, Extremes]
) -> list[Clipped]:
    """The sites that clip, worst first."""
    found = [
        Clipped(name, kept, seen[observer])
        for part in parts
        for name, observer in static_observers(part)
        if observer in seen and (kept := code_range(observer))
    ]
    clipped = [each for each in found if each.share >= _LEAST_SHARE]
    return sorted(clipped, key=lambda each: -each.share)


def _cost(
    part: fx.GraphModule,
    seen: Mapping[ObserverBase, Extremes],
    first: Sample,
    farthest: Call,
) -> Cost | None:
    """What the ranges cost; None unless "minmax" would be much better."""
    as_calibrated = {observer: observer for _, observer in static_observers(part)}
    few = farthest.sample.extremes()
    hinted = None if few is None else side_by_side_db(part, as_calibrated, few)
    if hinted is not None and not hinted < GOOD_DB + _MARGIN_DB:
        return None
    wide = {each: minmax(each, seen[each]) if each in seen else each for each in as_calibrated}
    if few is not None and hinted is not None:
        wider = side_by_side_db(part, wide, few)
        if wider is not None and not _is_costly(hinted, wider, _MARGIN_DB):
            return None
    reached = rounded_db(part, as_calibrated, farthest.sample)
    best = rounded_db(part, wide, farthest.sample) if reached < GOOD_DB else math.nan
    if not _is_costly(reached, best):
        return None
    at_first = rounded_db(part, as_calibrated, first)
    return Cost(farthest.batch, at_first, reached, (rounded_db(part, wide, first), best))


def _is_costly(reached: float, best: float, margin: float = 0.0) -> bool:
    """Whether ``reached`` dB are bad, and ``best`` much better; NaN is neither."""
    return reached < GOOD_DB + margin and best >= reached + LEAST_GAIN_DB - margin


def _extremes(observer: ObserverBase) -> Extremes | None:
    """The extremes that a per-tensor observer has seen, if it keeps them."""
    found = [getattr(observer, name, None) for name in ("min_val", "max_val")]
    if not all(isinstance(x, Tensor) and x.numel() == 1 and bool(x.isfinite()) for x in found):
        return None
    low, high = map(float, found)  # type: ignore[arg-type]
    return low, high
