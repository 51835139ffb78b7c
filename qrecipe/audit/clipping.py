"""How much of the calibration data the calibrated ranges clip, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from qrecipe._torch_ao import MinMaxObserver, ObserverBase
from qrecipe.audit.moving_averages import Average, Averages, Extremes, activation_observers, span
from qrecipe.audit.ranges import quantizes
from qrecipe.audit.rounding import code_range, minmax, rounded_db
from qrecipe.audit.sample import JUDGEABLE_DB, Sample
from qrecipe.errors.findings import Finding
from qrecipe.model.call import Inputs
from qrecipe.model.nested import cloned

LEAST_GAIN_DB = 6.0
"""The least gain of "minmax" on one batch (about one bit) that is worth a warning."""

GOOD_DB = 20.0
"""An output this close to float needs no better ranges."""

BAD_DB = 8.0
"""Below this, two fifths of an output are noise: worth a warning even with many batches."""

_LEAST_SHARE = 0.01
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Farthest:
    """The call of a part that went furthest beyond its output range, where clipping shows."""

    reach: float
    batch: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class Clipped:
    """A site, the range that it keeps, and the range that calibration saw."""

    site: str
    kept: Extremes
    seen: Extremes

    @property
    def share(self) -> float:
        """The clipped part of the range that was seen (zero included), 0 to 1."""
        return _outside(self.kept, self.seen) / (span(self.seen) or 1.0)

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
        cost = self.cost
        return self.shows_below(BAD_DB) and cost is not None and cost.first_db >= JUDGEABLE_DB

    def __str__(self) -> str:
        told = _told(self.clipped)
        return told if self.cost is None else f"{told}; {self.cost}"


@contextmanager
def farthest_kept(
    parts: Iterable[fx.GraphModule], averages: Averages
) -> Iterator[Mapping[fx.GraphModule, Farthest]]:
    """Keep, for each part, the call that goes furthest beyond the range of its last observer.

    Clipping at the output cannot be made up for later. The first batch would not show it, since a
    moving average starts from that one.
    """
    kept: dict[fx.GraphModule, Farthest] = {}
    handles = []
    for part in parts:
        observers = _static_observers(part)
        if observers and type(observers[-1]) is not MinMaxObserver:
            watch = _Watch(observers[-1], averages.get(observers[-1]))
            hook = partial(watch.note, kept)
            handles.append(part.register_forward_hook(hook, with_kwargs=True))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Counts the calls of a part and measures how far each one reached."""

    def __init__(self, observer: ObserverBase, average: Average | None) -> None:
        self._observer = observer
        self._average = average
        self._calls = 0

    def note(
        self,
        kept: dict[fx.GraphModule, Farthest],
        part: fx.GraphModule,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        reach = self._reach()
        if reach > (kept[part].reach if part in kept else 0.0):
            sample = Sample(Inputs(args, dict(kwargs)).cloned(), cloned(output))
            kept[part] = Farthest(reach, self._calls, sample)
        self._calls += 1

    def _reach(self) -> float:
        """How far the last call was outside the average; other observers: how wide they are now.

        The latter grows with exactly the calls that reach further.
        """
        if self._average is None:
            return span(_extremes(self._observer) or (0.0, 0.0))
        kept = code_range(self._observer) if self._average.calls else None
        return 0.0 if kept is None else _outside(kept, self._average.last_batch()) / span(kept)


def clipping_of(
    parts: Mapping[str, fx.GraphModule],
    averages: Averages,
    batches: int,
    farthest: Mapping[fx.GraphModule, Farthest],
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
        if part in farthest and (cost := _cost(part, seen, first[path], farthest[part]))
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


def _told(clipped: Sequence[Clipped]) -> str:
    first = [f"{each.site} is clipped {each.extent}" for each in clipped[:1]]
    others = [f"{each.site} {each.extent}" for each in clipped[1:_MOST_NAMED]]
    told = ", ".join([*first, *others])
    more = len(clipped) - _MOST_NAMED
    return f"{told} and {more} more" if more > 0 else told


def _seen(
    parts: Iterable[fx.GraphModule], averages: Averages, batches: int
) -> dict[ObserverBase, Extremes]:
    """What each observer saw, if it keeps its extremes or its average tells them."""
    seen: dict[ObserverBase, Extremes] = {}
    for part in parts:
        for observer in _static_observers(part):
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
        for name, observer in activation_observers(part)
        if observer in seen and (kept := code_range(observer))
    ]
    clipped = [each for each in found if each.share >= _LEAST_SHARE]
    return sorted(clipped, key=lambda each: -each.share)


def _cost(
    part: fx.GraphModule, seen: Mapping[ObserverBase, Extremes], first: Sample, farthest: Farthest
) -> Cost | None:
    """What the ranges cost; None unless "minmax" would be much better."""
    as_calibrated = {observer: observer for observer in _static_observers(part)}
    reached = rounded_db(part, as_calibrated, farthest.sample)
    if not reached < GOOD_DB:  # NaN too: the output has no floats
        return None
    wide = {each: minmax(each, seen[each]) if each in seen else each for each in as_calibrated}
    best = rounded_db(part, wide, farthest.sample)
    if not best >= reached + LEAST_GAIN_DB:
        return None
    at_first = rounded_db(part, as_calibrated, first)
    return Cost(farthest.batch, at_first, reached, (rounded_db(part, wide, first), best))


def _static_observers(part: fx.GraphModule) -> list[ObserverBase]:
    """The observers of static ranges, in graph order."""
    return [observer for _, observer in activation_observers(part) if quantizes(observer)]


def _extremes(observer: ObserverBase) -> Extremes | None:
    """The extremes that a per-tensor observer has seen, if it keeps them."""
    found = [getattr(observer, name, None) for name in ("min_val", "max_val")]
    if not all(isinstance(x, Tensor) and x.numel() == 1 and bool(x.isfinite()) for x in found):
        return None
    low, high = map(float, found)  # type: ignore[arg-type]
    return low, high


def _outside(kept: Extremes, seen: Extremes) -> float:
    """How far ``seen`` reaches beyond ``kept``."""
    return max(0.0, kept[0] - seen[0]) + max(0.0, seen[1] - kept[1])
