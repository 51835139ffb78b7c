"""Progress of long work: a line on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from qrecipe.errors.findings import ExecutionError
from qrecipe.errors.text import shown

Progress = Callable[[int, "int | None"], None]
"""Called with the number of steps done and the total, which is None until it is known."""


_Item = TypeVar("_Item")
_TOO_EARLY = 1.0
_WIDTH = 60


def chosen_progress(given: Progress | bool | None, label: str) -> Progress:
    """What a caller's ``progress`` stands for: True and None the terminal's, False silence.

    Raises ``ExecutionError`` (QR425) for anything else that cannot be called.
    """
    if given is None or given is True:
        return terminal_progress(label)
    if given is False:
        return silent
    if not callable(given):
        text = f"progress is a function or a bool, not {shown(type(given).__name__)}"
        raise ExecutionError.of("QR425", text)
    return given


def terminal_progress(label: str) -> Progress:
    """Progress as one self-updating line on stderr; silent if stderr is not a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():  # None if the process has none
        return silent

    start = time.monotonic()

    def show(done: int, total: int | None) -> None:
        of = f"/{total}" if total is not None else ""
        left = _time_left(time.monotonic() - start, done, total)
        end = "\n" if done == total else ""
        # padded because the previous line may have been longer
        print(f"\r{f'{label} {done}{of}{left}':<{_WIDTH}}", end=end, file=sys.stderr, flush=True)

    return show


def tracked(
    items: Iterable[_Item], show: Progress, total: int | None
) -> Iterator[tuple[int, _Item]]:
    """The items, numbered from 0; ``show`` is told of each that is done, and that it was the last.

    The caller has done with an item when it asks for the next.
    """
    done = 0
    for item in items:
        yield done, item
        done += 1
        show(done, total)
    if done and done != total:
        show(done, done)


@contextmanager
def activity(label: str) -> Iterator[None]:
    """A line on a terminal's stderr that says what takes so long, gone at the end."""
    show_on = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None
    if show_on is not None:
        print(f"{label} …", end="\r", file=show_on, flush=True)
    try:
        yield
    finally:
        if show_on is not None:
            print(f"{'':<{_WIDTH}}", end="\r", file=show_on, flush=True)


def silent(done: int, total: int | None) -> None:
    """Shows nothing."""


def _time_left(elapsed: float, done: int, total: int | None) -> str:
    """The estimated time left, or nothing if it cannot be estimated."""
    if total is None or not 0 < done < total or elapsed < _TOO_EARLY:
        return ""
    seconds = round(elapsed / done * (total - done))
    return f", {seconds // 60}:{seconds % 60:02} left"
