"""Times that are measured in rounds, and their quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: the lower quartile over all rounds, and how far the upper one is from it.

    Other processes only add time, so what is low is nearer to the truth.
    """

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, high - low)


NO_TIME = Timing(0.0, 0.0)


def total(timings: Iterable[Timing]) -> float:
    return sum(timing.seconds for timing in timings)


@dataclass(slots=True)
class Stopwatch(Generic[Key]):
    """Seconds by key in each round; several times in one round add up."""

    rounds: list[dict[Key, float]] = field(default_factory=list)

    def start_round(self) -> None:
        self.rounds.append({})

    def add(self, key: Key, seconds: float) -> None:
        now = self.rounds[-1]
        now[key] = now.get(key, 0.0) + seconds

    def timings(self) -> dict[Key, Timing]:
        keys = dict.fromkeys(key for each in self.rounds for key in each)
        return {key: Timing.of(self.seconds(key)) for key in keys}

    def seconds(self, key: Key) -> list[float]:
        """The time of each round."""
        return [each.get(key, 0.0) for each in self.rounds]
