"""Progress of long work: a line on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[int, "int | None"], None]
"""Called with the number of steps done and of all steps, None where that is not known."""


def terminal_progress(label: str) -> Progress:
    """Progress as one line that rewrites itself on stderr; silent where that is no terminal."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int | None) -> None:
        of = f"/{total}" if total is not None else ""
        end = "\n" if done == total else ""
        print(f"\r{label} {done}{of}", end=end, file=sys.stderr, flush=True)

    return show
