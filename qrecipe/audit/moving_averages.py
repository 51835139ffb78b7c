"""Moving averages: what they saw, and what the first batch still weighs in the end."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn

from qrecipe._torch_ao import MovingAverageMinMaxObserver, ObserverBase
from qrecipe.audit.ranges import static_observers

NARROW_RATIO = 3.0
"""How much narrower than the median batch a range may be; batches themselves differ by less."""

MANY_BATCHES = 100
"""With this many, the first batch of a moving average weighs little: 37 % with torch's constant."""

LITTLE_WEIGHT = 0.37
"""The weight of the first of `MANY_BATCHES` with torch's constant, 0 to 1."""

Extremes = tuple[float, float]
"""The lowest and the highest value of a tensor."""


@dataclass(frozen=True, slots=True)
class Average:
    """The averaged extremes of an observer before calibration and after each of its calls.

    The range of each batch follows from them, so nothing has to be computed in between.
    """

    constant: float
    history: list[Extremes] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.history) - 1

    @property
    def is_continued(self) -> bool:
        """Whether the average continues from earlier batches."""
        return math.isfinite(self.history[0][0])

    @property
    def first_weight(self) -> float:
        """The weight of the first batch, or of what was observed before, in the average."""
        return float((1 - self.constant) ** (self.calls - (not self.is_continued)))

    def batches(self) -> Iterator[Extremes]:
        """The extremes of each call: the average moved towards them by ``constant``."""
        for (low, high), (next_low, next_high) in itertools.pairwise(self.history):
            if math.isfinite(low):
                c = self.constant
                yield low + (next_low - low) / c, high + (next_high - high) / c
            else:  # the very first call sets the average
                yield next_low, next_high

    def seen(self) -> Extremes:
        """The extremes of all calls and of the average that they started from."""
        before = self.history[:1] if self.is_continued else []
        lows, highs = zip(*before, *self.batches(), strict=True)
        return min(lows), max(highs)

    def is_narrow(self) -> bool:
        """Whether the range is far narrower than most batches."""
        typical = statistics.median(span(extremes) for extremes in self.batches())
        return typical > NARROW_RATIO * span(self.history[-1])


Averages = Mapping[ObserverBase, Average]


@contextmanager
def watched(parts: Iterable[fx.GraphModule]) -> Iterator[Averages]:
    """Record the averages of all moving-average observers of activations while batches run."""
    averages: dict[ObserverBase, Average] = {}
    with ExitStack() as hooks:
        for part in parts:
            for _, observer in static_observers(part):
                if type(observer) is MovingAverageMinMaxObserver and observer not in averages:
                    average = averages[observer] = Average(float(observer.averaging_constant))
                    _note(average, observer)
                    hooks.enter_context(observer.register_forward_hook(partial(_note, average)))
        yield averages


def first_weight(averages: Averages, batches: int) -> float | None:
    """The weight of the first batch in averages that saw each batch once; None without any."""
    weights = [
        average.first_weight
        for average in averages.values()
        if average.calls == batches and not average.is_continued
    ]
    return max(weights, default=None)


def weight_text(weight: float) -> str:
    """The weight of the first batch, to follow the number of batches in a sentence."""
    return f", of which the first weighs {weight:.0%} in moving averages"


def span(extremes: Extremes) -> float:
    """The width of a range as a scale covers it, zero included."""
    low, high = extremes
    return max(high, 0.0) - min(low, 0.0)


def _note(average: Average, observer: nn.Module, *call: Any) -> None:
    assert isinstance(observer, MovingAverageMinMaxObserver)
    average.history.append((float(observer.min_val), float(observer.max_val)))
