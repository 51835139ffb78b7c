"""Plain-text tables that fit the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

_GAP = "  "
_NARROWEST = 8


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a ruled header.

    On a terminal the widest columns are cut to fit, the first one, which names, last; a file or a
    pipe gets everything.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    if _is_on_terminal():
        available = shutil.get_terminal_size().columns - len(_GAP) * (len(widths) - 1)
        _shrink(widths, available, range(1, len(widths)))
        _shrink(widths, available, [0])
    lines = [_line(header, widths), _GAP.join("─" * width for width in widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def room_beside(rows: Sequence[Sequence[str]], most: int) -> int:
    """How wide a last column of bars may be for its bars to be told apart, ``most`` at most."""
    if not _is_on_terminal():
        return most
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    taken = sum(widths) + len(_GAP) * len(widths)
    return max(_NARROWEST, min(most, shutil.get_terminal_size().columns - taken))


def _is_on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None in a process without any


def _shrink(widths: list[int], available: int, columns: Sequence[int]) -> None:
    """Narrow the widest of some columns, letter by letter, until the table fits."""
    while sum(widths) > available:
        widest = max(columns, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            return
        widths[widest] -= 1


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(_fit(cell, width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _fit(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"
