"""Models that are timed in turns, and compared round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch

Seconds = Sequence[float]
"""Of one model, round by round; the models took turns in each round."""

_NOISE = 0.03


def clock() -> Callable[[], float]:
    """What to time calls of models with, in seconds.

    With several threads it is wall time. With one it is the CPU time of this thread, which does not
    contain what other programs on the machine take in between.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times as fast one model is as another: the quartiles and the median of the rounds.

    Each round is compared with itself, since other load on the machine affects both alike. Beyond
    noise is a difference of more than 3 % in three quarters of the rounds.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, model: Seconds, other: Seconds) -> Speed:
        """That of a model against another one, from at least two rounds."""
        ratios = [theirs / own for own, theirs in zip(model, other, strict=True)]
        return cls(*quantiles(ratios, n=4))

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
        """Whether neither is faster in most rounds."""
        return self.low >= 1 - _NOISE and self.high <= 1 / (1 - _NOISE)

    @property
    def text(self) -> str:
        """The median, or the quartiles where the rounds differ by more than the models."""
        if self.is_faster or self.is_slower:
            return f"{self.median:.2f}"
        return f"{self.low:.2f} to {self.high:.2f}"
