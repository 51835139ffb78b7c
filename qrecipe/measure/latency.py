"""How long two models take for the same inputs, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qrecipe.measure.turns import Speed
from qrecipe.model.call import Inputs
from qrecipe.process.threads import clock

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
