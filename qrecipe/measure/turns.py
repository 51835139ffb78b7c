"""Models that are timed in turns, and compared round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import nn

from qrecipe.model.call import Inputs
from qrecipe.process.threads import clock
from qrecipe.terminal.progress import Progress, silent

Seconds = Sequence[float]
"""Of one model, round by round; the models took turns in each round."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: the lower quartile over all rounds, and how far the upper one is from it.

    Other processes only add time, so what is low is nearer to the truth.
    """

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Seconds) -> Timing:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, high - low)


NO_TIME = Timing(0.0, 0.0)


def total(timings: Iterable[Timing]) -> float:
    return sum(timing.seconds for timing in timings)


@dataclass(slots=True)
class Stopwatch:
    """Seconds by key in each round; several times in one round add up."""

    rounds: list[dict[Hashable, float]] = field(default_factory=list)

    def start_round(self) -> None:
        self.rounds.append({})

    def add(self, key: Hashable, seconds: float) -> None:
        now = self.rounds[-1]
        now[key] = now.get(key, 0.0) + seconds

    def timings(self) -> dict[Hashable, Timing]:
        return {key: Timing.of(seconds) for key, seconds in self.seconds().items()}

    def seconds(self) -> dict[Hashable, Seconds]:
        """By key, the time of each round."""
        keys = dict.fromkeys(key for each in self.rounds for key in each)
        return {key: [each.get(key, 0.0) for each in self.rounds] for key in keys}


@dataclass(frozen=True, slots=True)
class Pass:
    """What runs calls, such as a model, and the seconds that all of them took in each round.

    ``parts`` is what it notes of itself while it runs.
    """

    run: Callable[[Inputs], object]
    calls: Sequence[Inputs]
    parts: Stopwatch = field(default_factory=Stopwatch)
    now: Callable[[], float] = field(default_factory=clock)
    whole: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, calls: Sequence[Inputs], parts: Stopwatch | None = None) -> Pass:
        return cls(lambda inputs: inputs.call(model), calls, parts or Stopwatch())

    def run_round(self) -> None:
        self.parts.start_round()
        self.whole.append(0.0)
        for inputs in self.calls:
            given = inputs.cloned()  # some models write to their inputs
            start = self.now()
            self.run(given)
            self.whole[-1] += self.now() - start

    def forget(self) -> None:
        """Forget the rounds so far, which warmed up."""
        self.parts.rounds.clear()
        self.whole.clear()


_WARM_UP = 2


def run_in_turn(
    passes: Sequence[Pass],
    fewest: int,
    most: int = 0,
    budget: float = 0.0,
    show: Progress = silent,
) -> None:
    """Run all passes in each round, so that other load on the machine affects all alike.

    After two rounds that warm up, there are ``fewest``, or up to ``most`` within the ``budget`` of
    seconds.
    """
    for _ in range(_WARM_UP):
        start = time.perf_counter()
        for each in passes:
            each.run_round()
    taken = time.perf_counter() - start
    for each in passes:
        each.forget()
    rounds = max(fewest, min(most, int(budget / taken)))
    for done in range(1, rounds + 1):
        for each in passes:
            each.run_round()
        show(done, rounds)


def twice(passes: Sequence[Pass]) -> list[Pass]:
    """The passes, each right after one that runs the same and is not looked at.

    The first run fetches weights and code again, since the model before it has used the caches.
    """
    return [turn for each in passes for turn in (Pass(each.run, each.calls), each)]


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
    """Call both in turn for about ``budget`` seconds, as `threads.clock` times them."""
    passes = [Pass.of(model, [inputs]) for model in (reference, candidate)]
    with torch.no_grad():
        run_in_turn(twice(passes), _MIN_RUNS, _MAX_RUNS, budget)
    return Latency.of(*(each.whole for each in passes))
