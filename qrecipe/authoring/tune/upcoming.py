"""What a search may want next: the same search again, with guesses for what is not known yet."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from qrecipe.authoring.tune.estimates import Estimates
from qrecipe.authoring.tune.levers import Candidate, Lever
from qrecipe.authoring.tune.search import Bench, Measured, Search

Key = tuple[Candidate, bool]
"""A candidate, and whether it is measured again."""

_MOST_GUESSED = 64
"""How many guesses are followed at most: many lead to what is known already."""


class Memory(Protocol):
    """What is known without trying anything."""

    def known(self, candidate: Candidate, is_again: bool) -> Measured | None: ...

    def known_estimates(self, levers: tuple[Lever, ...]) -> Estimates | None: ...


def upcoming(begin: Callable[[Bench], Search], memory: Memory) -> Iterator[Key]:
    """Candidates in the order of how likely the search is to want them, the next one first.

    The search depends on nothing but the answers of its bench. So it is run on what is known, up to
    a candidate that is not; then once for each guess of what that one gives; and so on.
    """
    order = count()
    waiting: list[tuple[float, int, Mapping[Key, Measured]]] = [(-1.0, next(order), {})]
    found: set[Key] = set()
    for _ in range(_MOST_GUESSED):
        if not waiting:
            return
        share, _, guesses = heapq.heappop(waiting)
        search = begin(_Guessing(memory, guesses))
        try:
            search.run()
        except _UnknownError as unknown:
            key = unknown.key
        else:
            continue
        if key is None:
            continue
        if key not in found:
            found.add(key)
            yield key
        for likely, guess in _guesses(search.target):
            heapq.heappush(waiting, (share * likely, next(order), {**guesses, key: guess}))


def _guesses(target: float) -> Iterator[tuple[float, Measured]]:
    """What a candidate may give, with shares that add up to 1.

    Most levers gain nothing; a set of float sites is as likely to be enough as not.
    """
    yield 0.45, Measured(None, 0.0, "a guess")
    yield 0.4, Measured(target, 0.0)
    yield 0.15, Measured(math.nextafter(target, -math.inf), 0.0)


class _UnknownError(Exception):
    """Ends a search at a candidate that nothing is known of, or at estimates (None)."""

    def __init__(self, key: Key | None) -> None:
        super().__init__(key)
        self.key = key


@dataclass(frozen=True, slots=True)
class _Guessing:
    """A bench that tries nothing."""

    memory: Memory
    guesses: Mapping[Key, Measured]

    def measure(self, candidate: Candidate) -> Measured:
        return self._answer(candidate, False)

    def repeat(self, candidate: Candidate) -> Measured:
        return self._answer(candidate, True)

    def estimates(self, levers: tuple[Lever, ...]) -> Estimates:
        found = self.memory.known_estimates(levers)
        if found is None:
            raise _UnknownError(None)
        return found

    def _answer(self, candidate: Candidate, is_again: bool) -> Measured:
        found = self.memory.known(candidate, is_again) or self.guesses.get((candidate, is_again))
        if found is None:
            raise _UnknownError((candidate, is_again))
        return found
