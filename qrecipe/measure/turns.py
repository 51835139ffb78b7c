"""Models that are timed in turns, and compared round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn

from qrecipe.model.call import Inputs
from qrecipe.process.threads import clock

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


_WARM_UP = 2
_MIN_RUNS = 5
_MAX_RUNS = 50


@dataclass(frozen=True, slots=True)
class Latency:
    """Median seconds of one call each, over ``runs`` interleaved runs.

    Each spread is half the distance between the quartiles. ``speed`` is that of the candidate
    against the reference, run by run.
    """

    reference: float
    candidate: float
    reference_spread: float
    candidate_spread: float
    runs: int
    threads: int
    speed: Speed

    @classmethod
    def of(cls, reference: Sequence[float], candidate: Sequence[float]) -> Latency:
        """What runs of both took, with torch's current number of threads."""
        return cls(
            statistics.median(reference),
            statistics.median(candidate),
            _spread(reference),
            _spread(candidate),
            len(reference),
            torch.get_num_threads(),
            Speed.of(candidate, reference),
        )


def _spread(seconds: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2


def compare_latency(
    reference: nn.Module, candidate: nn.Module, inputs: Inputs, budget: float = 5.0
) -> Latency:
    """Call both in turn, so that other load on the machine affects both alike, as `threads.clock`.

    Each is called twice and timed once, because the first call fetches its weights and code again.

    ``budget`` is roughly the number of seconds to spend, beyond the minimum number of runs.
    """
    models = (reference, candidate)
    with torch.no_grad():
        for _ in range(_WARM_UP):
            for model in models:
                inputs.call(model)
        times: tuple[list[float], list[float]] = ([], [])
        now, end = clock(), time.perf_counter() + budget
        while len(times[0]) < _MIN_RUNS or (
            len(times[0]) < _MAX_RUNS and time.perf_counter() < end
        ):
            for model, taken in zip(models, times, strict=True):
                inputs.call(model)  # the other one has used the caches
                start = now()
                inputs.call(model)
                taken.append(now() - start)
    return Latency.of(*times)
