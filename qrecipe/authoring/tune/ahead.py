"""Candidates tried on workers, some of them before the search asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qrecipe.authoring.tune.levers import Candidate
from qrecipe.authoring.tune.log import TrialLog
from qrecipe.authoring.tune.search import Measured
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
