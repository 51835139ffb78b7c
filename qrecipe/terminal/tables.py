"""Plain text that fits the terminal: tables, bars, paragraphs. Files and pipes get all of it."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

_GAP = "  "
_NARROWEST, _LONGEST_PART, _LONGEST_WORD = 8, 12, 40
_WORD = re.compile(r"[^ +]*[ +]*")
"""A word of a cell, with what follows it; ``Conv2d+ReLU`` are two."""
_BETWEEN_PARTS = re.compile(
    r"(?<=[/:,_])|(?<=\D\.)|(?<=\.)(?!\d)|(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z]{2}-)|(?<=\d-)(?=[a-z])",
    re.ASCII,
)
"""Where a word may be broken in a column too narrow for it; a number stays whole."""


def render_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    spare: Sequence[int] = (),
    noted: int | None = None,
) -> str:
    """Aligned columns under a ruled header.

    A row is one line in a file or a pipe, and on a terminal where that fits. Where it does not,
    what the column ``noted`` says more than once becomes a note below the table, and other
    cells are wrapped in the column where the fewest rows need it, the first column last. Where
    words would be broken, the ``spare`` columns are left out first, one by one, in that order.
    """
    columns = [_Column.of(*each) for each in zip(header, *rows, strict=True)]
    notes: list[str] = []
    if _is_on_terminal():
        if noted is not None and sum(each.width for each in columns) > _available(len(columns)):
            columns[noted], notes = _with_notes(columns[noted])
        columns = _without(columns, spare)
        widths = _fitted(columns)
    else:
        widths = [column.width for column in columns]
    rule = _GAP.join("─" * width for width in widths)
    lines = zip(*(column.cells for column in columns), strict=True)
    head, *body = (list(_lines(row, widths)) for row in lines)
    below = ["", *map(wrapped, notes)] if notes else []
    return "\n".join([*head, rule, *chain(*body), *below])


def wrapped(text: str) -> str:
    """The lines of a text, on a terminal broken between words where they are too long for it."""
    if not _is_on_terminal():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


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


@dataclass(frozen=True, slots=True)
class _Column:
    """A column's cells, the first of them its header, and the widths that keep things whole.

    ``width`` is for cells, ``words`` and ``parts`` for words and their parts. ``lengths`` are
    those of the cells without the header, in order.
    """

    cells: tuple[str, ...]
    width: int
    words: int
    parts: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, *cells: str) -> _Column:
        words = {piece.rstrip() for cell in cells for piece in _WORD.findall(cell)}
        parts = max(len(part) for word in words for part in _BETWEEN_PARTS.split(word))
        return cls(
            cells,
            width=max(map(len, cells)),
            words=min(_LONGEST_WORD, max(map(len, words))),
            parts=min(_LONGEST_PART, parts),
            lengths=tuple(sorted(map(len, cells[1:]))),
        )

    def broken(self, width: int) -> int:
        """How many cells take more than one line at a width; the header counts for none."""
        return len(self.lengths) - bisect_left(self.lengths, width + 1)


def _available(columns: int) -> int:
    """The width of a terminal without the gaps between so many columns."""
    return shutil.get_terminal_size().columns - len(_GAP) * (columns - 1)


def _with_notes(column: _Column) -> tuple[_Column, list[str]]:
    """A column with numbers for the long cells that it repeats, and what the numbers stand for."""
    header, *cells = column.cells
    repeated = [
        cell for cell, count in Counter(cells).items() if count > 1 and len(cell) > _NARROWEST
    ]
    marks = {cell: f"[{number}]" for number, cell in enumerate(repeated, 1)}
    marked = _Column.of(header, *(marks.get(cell, cell) for cell in cells))
    return marked, [f"{mark} {cell}" for cell, mark in marks.items()]


def _without(columns: Sequence[_Column], spare: Sequence[int]) -> list[_Column]:
    left = dict(enumerate(columns))
    for each in spare:
        if sum(column.words for column in left.values()) <= _available(len(left)):
            break
        del left[each]
    return [*left.values()]


def _fitted(columns: Sequence[_Column]) -> list[int]:
    """Widths that fit the terminal, or the least ones."""
    widths, available = [column.width for column in columns], _available(len(columns))
    first, others = [0], range(1, len(columns))
    for least in (
        [column.words for column in columns],
        [column.parts for column in columns],
        [min(_NARROWEST, column.width) for column in columns],
    ):
        for some in (others, first):
            _shrink(columns, widths, available, least, some)
    return widths


def _shrink(
    columns: Sequence[_Column],
    widths: list[int],
    available: int,
    least: Sequence[int],
    some: Sequence[int],
) -> None:
    """Narrow some columns letter by letter until all fit: where the fewest rows are broken."""
    while sum(widths) > available:
        wider = [each for each in some if widths[each] > least[each]]
        if not wider:
            return
        widths[min(wider, key=lambda at: (columns[at].broken(widths[at] - 1), -widths[at]))] -= 1


def _lines(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """A row, on as many lines as its tallest cell needs."""
    broken = [list(_broken(cell, width)) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*broken, fillvalue=""):
        aligned = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
        yield _GAP.join(aligned).rstrip()


def _broken(cell: str, width: int) -> Iterator[str]:
    """The cell in pieces of at most that width, broken between words where possible."""
    line = ""
    for piece in chain.from_iterable(_pieces(word, width) for word in _WORD.findall(cell)):
        if line and len(line) + len(piece.rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            yield line[:width]
            line = line[width:]
    yield line.rstrip()


def _pieces(word: str, width: int) -> Sequence[str]:
    """A word, or its parts if it is too long."""
    return [word] if len(word.rstrip()) <= width else _BETWEEN_PARTS.split(word)
