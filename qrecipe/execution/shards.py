"""Calibration by the ranks of a group: what they have to agree on, and how they take turns.

Each rank runs its own batches and notes what its observers are shown. Then all ranks show their
observers the notes of all: the first batch of each, the second of each, and so on. Histograms are
counted in a second run, because a call is counted in the bins that those before it have left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import FakeQuantizeBase
from qrecipe.audit.ranges import static_owners
from qrecipe.errors.findings import CalibrationError, Finding, PluginError
from qrecipe.execution.batches import begun, no_batches
from qrecipe.model.digest import tensors_digest
from qrecipe.observers.merging import Span, Subject, add_counts, counted, shown_to, spans
from qrecipe.process import ranks


def check_same(step: str, fingerprint: str, model: nn.Module) -> None:
    """Raises ``CalibrationError`` (QR409) on all ranks unless recipe and model are the same."""

    def facts() -> dict[str, str]:
        modules = [f"{path} {type(module).__name__}" for path, module in model.named_modules()]
        return {
            "another torch": torch.__version__,
            "another recipe": fingerprint,
            "another model": "\n".join(modules),
            "other tensors": tensors_digest(_tensors(model)),
        }

    ranks.check_same(step, facts)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors, but not those that torch's fake-quants leave uninitialised until they round."""
    for path, module in model.named_modules():
        if not isinstance(module, FakeQuantizeBase):
            for name, tensor in chain(
                module.named_parameters(recurse=False), module.named_buffers(recurse=False)
            ):
                yield f"{path}.{name}", tensor


def first_of_all(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch of the first rank that has one, and all batches of this rank.

    Raises ``CalibrationError`` (QR401) if no rank has one.
    """
    own, stream = begun(batches)
    has_one = ranks.gathered("a look for batches", lambda: bool(own))
    if not any(has_one):
        raise no_batches()
    lead = has_one.index(True)
    sent = ranks.gathered("the first batch", lambda: own if ranks.rank() == lead else [])
    return sent[lead][0], stream


def subjects_in(parts: Mapping[str, fx.GraphModule]) -> list[Subject]:
    """The observers of static ranges, once each."""
    found: dict[nn.Module, Subject] = {}
    for part in parts.values():
        for name, owner, observer in static_owners(part):
            found.setdefault(observer, Subject(name, owner, observer, owner))
    return list(found.values())


def check_mergeable(subjects: Sequence[Subject], has_merged: bool) -> None:
    """Raises ``PluginError`` (QR157) for observers that cannot be merged.

    One that merges itself cannot go on from what all ranks have seen before: each would count it.
    """
    silent = {type(each.observer).__name__ for each in subjects if each.merging is None}
    merging = {type(each.observer).__name__ for each in subjects if each.merging == "merge"}
    findings = [
        Finding(
            "QR157",
            f"the observer {name} does not say how it merges with those of other ranks",
            hint="give it a method merge(self, others), or calibrate in one process",
        )
        for name in sorted(silent)
    ]
    findings += [
        Finding(
            "QR157",
            f"the observer {name} has already been merged, and cannot continue",
            hint="calibrate once with all batches, or prepare the model again",
        )
        for name in sorted(merging)
        if has_merged
    ]
    if findings:
        raise PluginError(findings)


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
                "the batches differ when they are read again",
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

    def note(at: int, observe: Callable[[Tensor], object], x: Tensor) -> None:
        shown = subjects[at].summary(x)
        if shown is not None:
            calls[at].append(Call(batches, ranks.rank(), shown))
        observe(x)

    with ExitStack() as stack:
        for at, subject in enumerate(subjects):
            observe = subject.owner.forward if subject.merging == "merge" else _nothing
            stack.enter_context(shown_to(subject.owner, partial(note, at, observe)))
        for _ in run():
            batches += 1
    return batches, calls


def _in_turn(calls: Iterator[list[Call]]) -> list[Call]:
    every = [call for own in calls for call in own]
    return sorted(every, key=lambda call: (call.batch, call.rank))


def _is_same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _nothing(x: Tensor) -> None:
    """What an observer does meanwhile."""
