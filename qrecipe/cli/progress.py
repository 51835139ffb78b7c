"""Progress on a terminal's stderr; nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qrecipe.terminal.progress import Progress as Callback


@contextmanager
def bar(label: str) -> Iterator[Callback]:
    """A bar that disappears at the end; yields a callback for steps done and total steps."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task(label, total=None)

        def show(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield show


@contextmanager
def activity(label: str) -> Iterator[None]:
    """A line that says what takes so long; it disappears at the end."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(label):
        yield
