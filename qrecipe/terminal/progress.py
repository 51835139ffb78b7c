"""Progress of long work: a line on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Progress = Callable[[int, "int | None"], None]
"""Called with the number of steps done and the total, None if that is unknown."""


_TOO_EARLY = 1.0
_WIDTH = 60


def terminal_progress(label: str) -> Progress:
    """Progress as one self-updating line on stderr; silent if stderr is not a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():  # None if the process has none
        return lambda done, total: None

    start = time.monotonic()

    def show(done: int, total: int | None) -> None:
        of = f"/{total}" if total is not None else ""
        left = _time_left(time.monotonic() - start, done, total)
        end = "\n" if done == total else ""
        # padded because the previous line may have been longer
        print(f"\r{f'{label} {done}{of}{left}':<{_WIDTH}}", end=end, file=sys.stderr, flush=True)

    return show


def _time_left(elapsed: float, done: int, total: int | None) -> str:
    """The estimated time left, or nothing if it cannot be estimated."""
    if total is None or not 0 < done < total or elapsed < _TOO_EARLY:
        return ""
    seconds = round(elapsed / done * (total - done))
    return f", {seconds // 60}:{seconds % 60:02} left"
