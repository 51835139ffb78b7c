"""Plain-text tables that fit the terminal."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

_GAP = "  "
_NARROWEST, _LONGEST_WORD = 8, 12
_PIECE = re.compile(r"(?:[^ +/.:,_]|(?<=\d)\.(?=\d))*[ +/.:,_]*")
"""A word or number of a cell, with the characters after which it may be broken."""


def render_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[int] = ()
) -> str:
    """Aligned columns under a ruled header.

    On a terminal, the widest columns are wrapped to fit, the first column last. Where that is not
    enough, the ``spare`` columns are left out one by one, in that order. A file or a pipe gets all
    of them, and one line per row.
    """
    columns = dict(enumerate(zip(header, *rows, strict=True)))
    if _is_on_terminal():
        for each in spare:
            if sum(map(_least_width, columns.values())) <= _available(len(columns)):
                break
            del columns[each]
    widths = [max(len(cell) for cell in column) for column in columns.values()]
    if _is_on_terminal():
        available, words = _available(len(widths)), list(map(_least_width, columns.values()))
        for least in (words, [min(_NARROWEST, width) for width in words]):
            _shrink(widths, available, least, range(1, len(widths)))
            _shrink(widths, available, least, [0])
    rule = _GAP.join("─" * width for width in widths)
    head, *body = (list(_lines(row, widths)) for row in zip(*columns.values(), strict=True))
    return "\n".join([*head, rule, *chain(*body)])


def _available(columns: int) -> int:
    """The width of a terminal without the gaps between so many columns."""
    return shutil.get_terminal_size().columns - len(_GAP) * (columns - 1)


def room_beside(rows: Sequence[Sequence[str]], most: int) -> int:
    """How wide a last column of bars may be, at most ``most``."""
    if not _is_on_terminal():
        return most
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    taken = sum(widths) + len(_GAP) * len(widths)
    return max(_NARROWEST, min(most, shutil.get_terminal_size().columns - taken))


_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(value: float, longest: float, width: int) -> str:
    """A bar whose length is the value's share of ``longest``; none for 0 and less."""
    if longest <= 0 or value <= 0:
        return ""
    eighths = round(value / longest * width * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _is_on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None if the process has none


def _least_width(column: Sequence[str]) -> int:
    """The width that keeps the words of a column whole, unless they are too long."""
    words = (len(piece.rstrip()) for cell in column for piece in _PIECE.findall(cell))
    return min(_LONGEST_WORD, max(words, default=0))


def _shrink(
    widths: list[int], available: int, least: Sequence[int], columns: Sequence[int]
) -> None:
    """Narrow the widest of the given columns, letter by letter, until the table fits."""
    while sum(widths) > available:
        wider = [column for column in columns if widths[column] > least[column]]
        if not wider:
            return
        widths[max(wider, key=widths.__getitem__)] -= 1


def _lines(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """A row, on as many lines as its tallest cell needs."""
    broken = [list(_broken(cell, width)) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*broken, fillvalue=""):
        aligned = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
        yield _GAP.join(aligned).rstrip()


def _broken(cell: str, width: int) -> Iterator[str]:
    """The cell in pieces of at most that width, broken between words where possible."""
    line = ""
    for piece in _PIECE.findall(cell):
        if line and len(line) + len(piece.rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            yield line[:width]
            line = line[width:]
    yield line.rstrip()
