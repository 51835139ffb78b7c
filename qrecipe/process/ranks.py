"""The processes of an initialised group of torch.distributed, each with a shard of the data.

All that they say to each other goes through `gathered`, so an error of one is told instead of what
the others wait for. The group is the default one; a single rank counts as no group.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.errors.text import first_line

P = ParamSpec("P")
R = TypeVar("R")

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_TOLD = "_told_to_all_ranks"


@dataclass(frozen=True, slots=True)
class _Message:
    """What a rank tells the others: what it does, how that failed, and its pickled result."""

    step: str
    failure: str | None
    result: bytes


def count() -> int:
    """The number of ranks; 1 outside a group."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The number of this process in its group, from 0."""
    return dist.get_rank() if count() > 1 else 0


def share(limit: int) -> int:
    """How many of ``limit`` batches are this rank's if all take one in turn."""
    return (limit - rank() + count() - 1) // count()


@contextmanager
def alone() -> Iterator[None]:
    """Work by oneself inside a ``with``, whatever group there is; also a decorator."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def together(function: Callable[P, R]) -> Callable[P, R]:
    """A function that fails on all ranks if it fails on one; a decorator."""

    @functools.wraps(function)
    def agreed(*args: P.args, **kwargs: P.kwargs) -> R:
        own: list[R] = []
        gathered(f"{function.__name__} ends", lambda: own.append(function(*args, **kwargs)))
        return own[0]

    return agreed


def gathered(step: str, work: Callable[[], R]) -> list[R]:
    """What the ranks' ``work`` gives, in their order, on every rank.

    An error of one rank is raised there, and on the others as ``CalibrationError`` (QR409). So is
    a rank that is at another step.
    """
    if count() == 1:
        return [work()]
    failure: Exception | None = None
    result = b""
    try:
        result = _pickled(step, work())
    except Exception as error:
        if _is_told(error):  # inside another step, which has ended for all
            raise
        failure = error
    told: list[Any] = [None] * count()
    said = None if failure is None else first_line(failure)
    dist.all_gather_object(told, _Message(step, said, result))
    if failure is not None:
        raise _as_told(failure)
    _check(told)
    return [pickle.loads(message.result) for message in told]


def check_same(step: str, facts: Callable[[], Mapping[str, str]]) -> None:
    """Raises ``CalibrationError`` (QR409) on all ranks if a fact differs between them.

    The names of facts are what a rank has that is not the same: "another recipe".
    """
    if count() == 1:
        return
    first, *others = gathered(step, lambda: dict(facts()))
    differing = [
        f"rank {number} has {', '.join(found)} than rank 0"
        for number, other in enumerate(others, 1)
        if (found := [what for what in first if other.get(what) != first[what]])
    ]
    if differing:
        raise _as_told(
            CalibrationError.of(
                "QR409",
                f"the ranks do not agree: {differing[0]}",
                hint="give all ranks the same recipe, and load the same weights everywhere",
                notes=tuple(differing[1:]),
            )
        )


def _pickled(step: str, result: object) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise CalibrationError.of(
            "QR409",
            f"what {step} gives cannot be sent to the other ranks: {first_line(error)}",
            hint="batches and observers must be picklable",
        ) from error


def _check(told: list[_Message]) -> None:
    """Raises ``CalibrationError`` (QR409) unless all ranks have done the same step."""
    findings = [
        Finding(
            "QR409",
            f"rank {number} failed: {message.failure}",
            hint="that rank raises the whole error",
        )
        for number, message in enumerate(told)
        if message.failure is not None
    ]
    steps = {message.step for message in told}
    if not findings and len(steps) > 1:
        at = ", ".join(f"rank {number}: {message.step}" for number, message in enumerate(told))
        hint = "call the same functions in the same order on all ranks"
        findings = [Finding("QR409", f"the ranks do different things ({at})", hint=hint)]
    if findings:
        raise _as_told(CalibrationError(findings))


_Raised = TypeVar("_Raised", bound=Exception)


def _as_told(error: _Raised) -> _Raised:
    """The error, marked as one that all ranks know of."""
    setattr(error, _TOLD, True)
    return error


def _is_told(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made from, is known to all ranks."""
    while error is not None:
        if hasattr(error, _TOLD):
            return True
        error = error.__cause__
    return False
