"""Candidates tried on workers, some of them before the search asks for them.

What it may want next is found by the same search, with guesses for what is not known yet.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from qrecipe.authoring.tune.estimates import Estimates
from qrecipe.authoring.tune.levers import Candidate, Lever
from qrecipe.authoring.tune.log import TrialLog
from qrecipe.authoring.tune.search import Bench, Measured, Search
from qrecipe.authoring.tune.trying import Tried, Values
from qrecipe.pool.crew import Crew, Ended
from qrecipe.pool.workers import Workers

Piece = tuple[str, Values]
"""The key of a candidate in the log, and what its recipe adds to the base."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A candidate to try: its key in the log, and what its recipe adds to the base."""

    key: str
    candidate: Candidate
    values: Values


class Ahead:
    """Keeps workers busy with what the search wants, and with what it may want next."""

    def __init__(self, crew: Crew[Piece], log: TrialLog) -> None:
        self._crew = crew
        self._log = log
        self._tried: dict[str, Tried] = {}
        self._early: dict[str, Candidate] = {}

    @property
    def workers(self) -> Workers:
        return self._crew.workers

    def known(self, key: str) -> Measured | None:
        """What a worker has found that the search has not asked for yet."""
        return self._tried[key].measured if key in self._tried else None

    def tried(
        self, wanted: Wanted, upcoming: Callable[[], Iterator[Wanted]], *, aloud: bool
    ) -> Tried:
        """Try a candidate, and meanwhile those that come next; ``aloud`` with its warnings."""
        while wanted.key not in self._tried:
            self._start(wanted, upcoming)
            ended = self._crew.ended()
            self._keep(ended)
            if aloud and ended.piece[0] == wanted.key:
                self._crew.say(ended.outcome.findings)
        return self._tried.pop(wanted.key)

    def settle(self) -> None:
        """Let workers end what they have begun."""
        self._crew.drop()
        while self._crew.running:
            self._keep(self._crew.ended())

    def _start(self, wanted: Wanted, upcoming: Callable[[], Iterator[Wanted]]) -> None:
        """Start what is wanted, and as much of what comes next as there are workers for."""
        most, chosen = self.workers.count, {wanted.key: wanted}
        for other in upcoming() if most > 1 else ():
            chosen.setdefault(other.key, other)
            if len(chosen) >= most:
                break
        self._crew.drop(lambda piece: piece[0] not in chosen)
        running = {key for key, _ in self._crew.running}
        for key, each in chosen.items():
            if key not in running and (each is wanted or len(running) < most):
                if each is not wanted:
                    self._early[key] = each.candidate
                self._crew.start((key, each.values))
                running.add(key)

    def _keep(self, ended: Ended[Piece]) -> None:
        key, tried = ended.piece[0], ended.outcome.value
        self._tried[key] = tried
        # whether a failed evaluation is a trial depends on what comes before
        if key in self._early and (tried.error is None or not tried.was_made):
            self._log.note_ahead(key, self._early[key], tried.measured)


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
