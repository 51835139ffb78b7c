"""Observers that see the batches of all ranks, as if these took turns in one process.

Each rank runs its own batches and notes what its observers are shown. Then all ranks show their
observers the notes of all: the first batch of each, the second of each, and so on. Histograms are
counted in a second run, because a call is counted in the bins that those before it have left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qrecipe.errors.findings import CalibrationError
from qrecipe.observers.merging import Span, Subject, add_counts, counted, shown_to, spans
from qrecipe.process import ranks

Run = Callable[[], Iterator[None]]
"""Runs one of this rank's batches in each step."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an observer, and a tensor that stands for what it was shown."""

    batch: int
    rank: int
    shown: Tensor


class Turns:
    """The calls of the observers of all ranks in turn; ``batches`` is how many those had."""

    def __init__(self, subjects: Sequence[Subject], run: Run, run_again: Run) -> None:
        self._subjects = subjects
        noted = ranks.gathered("a run of the batches", lambda: _noted(subjects, run))
        self._has_run = [batches > 0 for batches, _ in noted]
        self.batches = sum(batches for batches, _ in noted)
        self._calls = [_in_turn(own[at] for _, own in noted) for at in range(len(subjects))]
        self._counts: dict[int, list[Tensor]] = {}
        if any(subject.merging == "histogram" for subject in subjects):
            ranks.gathered("a second run of the batches", lambda: self._count(run_again))

    def calls(self, at: int) -> int:
        """How often an observer was called on all ranks."""
        return len(self._calls[at])

    def replay(self) -> None:
        """Show all observers what was noted."""
        for at, subject in enumerate(self._subjects):
            if subject.merging == "merge":
                states = ranks.gathered(subject.name, subject.state)
                subject.take(
                    [s for s, has_run in zip(states, self._has_run, strict=True) if has_run]
                )
            elif subject.merging == "histogram":
                found = ranks.gathered(subject.name, partial(self._counts.__getitem__, at))
                counts = [iter(each) for each in found]
                for call, span in self._spans(at):
                    add_counts(subject.observer, next(counts[call.rank]), span)
                subject.refresh()
            elif subject.merging == "extremes":
                for call in self._calls[at]:
                    subject.show(call.shown)

    def _spans(self, at: int) -> list[tuple[Call, Span]]:
        """The range of a histogram after each call."""
        calls = self._calls[at]
        extremes = [(call.shown[0], call.shown[1]) for call in calls]
        return list(zip(calls, spans(self._subjects[at].observer, extremes), strict=True))

    def _count(self, run: Run) -> None:
        """Run this rank's batches again, and count the values of histograms."""
        counting: dict[int, _Counting] = {}
        with ExitStack() as stack:
            for at, subject in enumerate(self._subjects):
                instead: Callable[[Tensor], None] = _nothing
                if subject.merging == "histogram":
                    own = (each for each in self._spans(at) if each[0].rank == ranks.rank())
                    instead = counting[at] = _Counting(deque(own), subject.observer.bins)
                stack.enter_context(shown_to(subject.owner, instead))
            for _ in run():
                pass
        if any(each.differs for each in counting.values()):
            raise CalibrationError.of(
                "QR409",
                "the batches are others when they are read again",
                hint="histograms of several ranks are counted in a second run: pass a list, or a "
                "loader that does not shuffle",
            )
        self._counts = {at: each.counts for at, each in counting.items()}


class _Counting:
    """Counts the calls of a histogram in the bins that it will have after each."""

    def __init__(self, expected: deque[tuple[Call, Span]], bins: int) -> None:
        self.counts: list[Tensor] = []
        self._expected = expected
        self._bins = bins
        self._differs = False

    @property
    def differs(self) -> bool:
        """Whether the calls are not those that were noted."""
        return self._differs or bool(self._expected)

    def __call__(self, x: Tensor) -> None:
        x = counted(x) if x.numel() else x
        if not x.numel():
            return
        if not self._expected:
            self._differs = True
            return
        call, (low, high) = self._expected.popleft()
        self._differs |= not _is_same(call.shown, torch.stack(torch.aminmax(x)))
        self.counts.append(torch.histc(x, self._bins, min=low, max=high))  # type: ignore[arg-type]


def _noted(subjects: Sequence[Subject], run: Run) -> tuple[int, list[list[Call]]]:
    """The number of this rank's batches, and the calls of each observer."""
    calls: list[list[Call]] = [[] for _ in subjects]
    batches = 0

    def note(at: int, x: Tensor) -> None:
        shown = subjects[at].summary(x)
        if shown is not None:
            calls[at].append(Call(batches, ranks.rank(), shown))

    with ExitStack() as stack:
        for at, subject in enumerate(subjects):
            observe = subject.owner.forward if subject.merging == "merge" else _nothing
            stack.enter_context(shown_to(subject.owner, _both(partial(note, at), observe)))
        for _ in run():
            batches += 1
    return batches, calls


def _both(
    first: Callable[[Tensor], object], second: Callable[[Tensor], object]
) -> Callable[[Tensor], None]:
    def call(x: Tensor) -> None:
        first(x)
        second(x)

    return call


def _in_turn(calls: Iterator[list[Call]]) -> list[Call]:
    every = [call for own in calls for call in own]
    return sorted(every, key=lambda call: (call.batch, call.rank))


def _is_same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _nothing(x: Tensor) -> None:
    """What an observer does meanwhile."""
