"""Pieces given to workers, and their outcomes in the order in which they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from qrecipe.errors.findings import ExecutionError, Finding
from qrecipe.errors.text import counted, first_line
from qrecipe.errors.warn import warn
from qrecipe.pool.parcel import Parcel, Work, sent
from qrecipe.pool.worker import Outcome, run
from qrecipe.pool.workers import Pool, Workers, hired

_Piece = TypeVar("_Piece")


@dataclass(frozen=True, slots=True)
class Ended(Generic[_Piece]):
    """A piece and its outcome."""

    piece: _Piece
    outcome: Outcome


class Crew(Generic[_Piece]):
    """Workers with a parcel, for pieces of one kind: plain values that can be pickled."""

    def __init__(self, workers: Workers, parcel: Parcel, batches: int) -> None:
        self.workers = workers
        self.batches = batches
        self._parcel = parcel
        self._running: dict[Future[Outcome], _Piece] = {}
        self._ended: SimpleQueue[Future[Outcome]] = SimpleQueue()
        self._done = 0
        self._may_renew = True
        self._said: set[Finding] = set()

    @property
    def running(self) -> list[_Piece]:
        """The pieces that have been started and have not come back."""
        return list(self._running.values())

    def start(self, piece: _Piece) -> None:
        """Give a piece to the workers; if they do not take it, it ends with their error."""
        try:
            future = self.workers.submit(run, self._parcel, piece)
        except Exception as error:  # whatever an executor raises that is broken or shut down
            future = Future()
            future.set_exception(error)
        self._running[future] = piece
        future.add_done_callback(self._ended.put)

    def drop(self, which: Callable[[_Piece], bool] = lambda piece: True) -> None:
        """Take back pieces that no worker has begun."""
        for future, piece in list(self._running.items()):
            if which(piece) and future.cancel():
                del self._running[future]

    def ended(self) -> Ended[_Piece]:
        """Wait for the next piece.

        Raises the error of a piece, and ``ExecutionError`` (QR428) if the workers failed and cannot
        be made anew.
        """
        while True:
            future = self._ended.get()
            if future not in self._running:
                continue  # taken back, or of workers that have failed
            piece = self._running.pop(future)
            try:
                outcome = future.result()
                if not isinstance(outcome, Outcome):
                    raise TypeError(f"the executor returns a {type(outcome).__name__} for a piece")
            except Exception as error:  # of the executor: `run` returns the errors of pieces
                self._start_again([piece, *self.running], error)
                continue
            self._may_renew = True
            self._done += 1
            if outcome.error is not None:
                raise outcome.error from _cause(outcome)
            return Ended(piece, outcome)

    def results(self, pieces: Iterable[_Piece]) -> Iterator[tuple[_Piece, Any]]:
        """Each piece with its value, as they come; warnings are given once."""
        for piece in pieces:
            self.start(piece)
        while self._running:
            ended = self.ended()
            self.say(ended.outcome.findings)
            yield ended.piece, ended.outcome.value

    def say(self, findings: Iterable[Finding]) -> None:
        """Give the warnings of workers, each once."""
        for finding in findings:
            if finding not in self._said:
                self._said.add(finding)
                warn(finding, ())

    def _start_again(self, pieces: list[_Piece], error: Exception) -> None:
        """Start pieces on new workers, unless no piece has come back since that was done before."""
        if not (self._may_renew and self.workers.renew()):
            text = (
                f"the workers failed after {counted(self._done, 'piece')}: "
                f"{type(error).__name__}: {first_line(error)}"
            )
            hint = (
                "a worker that dies has often run out of memory: try fewer workers at once; "
                "with resume (--log), finished pieces are kept"
            )
            raise ExecutionError.of("QR428", text, hint=hint) from error
        self._may_renew = False
        self._running.clear()
        for piece in pieces:
            self.start(piece)


@contextmanager
def crew_for(work: Work, batches: Iterable[Any], pool: Executor | Pool) -> Iterator[Crew[Any]]:
    """The workers of a pool with this work on these batches, inside a ``with``.

    Raises ``ExecutionError`` if there is no executor (QR425), or it cannot be sent (QR426).
    """
    with hired(pool) as workers, sent(work, batches, workers.factory) as (parcel, count):
        crew: Crew[Any] = Crew(workers, parcel, count)
        try:
            yield crew
        finally:
            crew.drop()


class _WorkerError(Exception):
    """The traceback of an error in a worker."""


def _cause(outcome: Outcome) -> Exception | None:
    return (
        None
        if outcome.trace is None
        else _WorkerError(f"\n\nin {outcome.worker}:\n{outcome.trace}")
    )
