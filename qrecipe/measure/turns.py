"""Models that are timed in turns, and compared round by round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

Seconds = Sequence[float]
"""Of one model, round by round; the models took turns in each round."""

_NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times as fast one model is as another: the median, and where it is with 95 %.

    Each round is compared with itself, since other load on the machine affects both alike. The
    interval of the median is that between two of the rounds in order (the sign test), whatever
    their distribution; more rounds make it smaller. Beyond noise is a difference of more than 3 %
    in the whole interval.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, model: Seconds, other: Seconds) -> Speed:
        """That of a model against another one, from at least two rounds."""
        ratios = sorted(theirs / own for own, theirs in zip(model, other, strict=True))
        count = len(ratios)
        outside = max(0, int((count - 1.96 * sqrt(count)) / 2))
        return cls(ratios[outside], statistics.median(ratios), ratios[count - 1 - outside])

    @property
    def is_faster(self) -> bool:
        """Whether the model is faster than the other one, beyond noise."""
        return self.low > 1 / (1 - _NOISE)

    @property
    def is_slower(self) -> bool:
        """Whether it is slower, beyond noise."""
        return self.high < 1 - _NOISE

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within noise."""
        return self.low >= 1 - _NOISE and self.high <= 1 / (1 - _NOISE)

    @property
    def text(self) -> str:
        """The median, or that the difference is within noise."""
        is_clear = self.is_faster or self.is_slower or self.low == self.high
        return f"{self.median:.2f}" if is_clear else "within noise"
