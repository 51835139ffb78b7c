"""What a report consists of, as text, as HTML and as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from html import escape
from itertools import count
from typing import Any, Protocol

from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import finite_or_none, printable
from qrecipe.terminal.tables import render_table, wrapped

_LONGEST_WORD = 24
_WIDE = 5
"""The number of columns from which on a table needs more room than a phone has."""

_TALL = 40
"""The number of rows above which a table hides what stands below it."""


class Section(Protocol):
    """A part of a report under a title, which its text leaves out."""

    @property
    def title(self) -> str: ...

    def text(self) -> str: ...

    def html(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header; ``numeric`` are the indices of right-aligned columns.

    ``spare`` are those of columns that a narrow terminal leaves out, in this order;
    ``noted`` is the one of a column whose repeated cells a narrow terminal shows below the table.
    ``note`` is a sentence below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: frozenset[int] = frozenset()
    spare: tuple[int, ...] = ()
    noted: int | None = None
    note: str = ""

    def without_empty_columns(self) -> Table:
        """The table without the columns that have a header and nothing else."""
        kept = [at for at in range(len(self.header)) if any(row[at] for row in self.rows)]
        if not self.rows:
            return self
        return replace(
            self,
            header=[self.header[at] for at in kept],
            rows=[[row[at] for at in kept] for row in self.rows],
            numeric=frozenset(map(kept.index, self.numeric & {*kept})),
            spare=tuple(kept.index(at) for at in self.spare if at in kept),
            noted=kept.index(self.noted) if self.noted in kept else None,
        )

    def text(self) -> str:
        table = render_table(self.header, self.rows, self.spare, self.noted)
        return f"{table}\n\n{wrapped(self.note)}" if self.note else table

    def html(self) -> str:
        caption = f'<p class="legend">{escaped(self.caption)}</p>\n' if self.caption else ""
        head = self._row(self.header, "th")
        body = "\n".join(self._row(row, "td") for row in self.rows)
        note = f"\n<p>{escaped(self.note)}</p>" if self.note else ""
        kind = ' class="wide"' if len(self.header) >= _WIDE else ""
        box = "scroll tall" if len(self.rows) > _TALL else "scroll"
        # a box of its own: a wide table must not widen the page around it
        return (
            f'{caption}<div class="{box}" style="overflow-x: auto" tabindex="0"><table{kind}>\n'
            f"<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{note}"
        )

    def _row(self, cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(map(self._cell, cells, [tag] * len(cells), count()))}</tr>"

    def _cell(self, cell: str, tag: str, position: int) -> str:
        # only such a word may break anywhere, or the other columns would shrink to letters
        is_long = any(len(word) > _LONGEST_WORD for word in cell.split())
        if position in self.numeric:
            start = f'<{tag} class="number">'
        else:  # notebooks align cells to the right, and with them bars
            kind = ' class="long"' if is_long else ""
            start = f'<{tag}{kind} style="text-align: left">'
        return f"{start}{escaped(cell)}</{tag}>"


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs."""

    title: str
    paragraphs: Sequence[str]

    def text(self) -> str:
        return "\n".join(map(wrapped, self.paragraphs))

    def html(self) -> str:
        return "\n".join(f"<p>{escaped(paragraph)}</p>" for paragraph in self.paragraphs)


@dataclass(frozen=True, slots=True)
class Listing:
    """Preformatted text, such as a recipe."""

    title: str
    lines: str

    def text(self) -> str:
        return self.lines

    def html(self) -> str:
        return f"<pre>{escaped(self.lines)}</pre>"


def escaped(text: str) -> str:
    """A text as HTML shows it."""
    return escape(printable(text))


def report_text(sections: Iterable[Section]) -> str:
    """The sections without their titles, an empty line between them."""
    return printable("\n\n".join(section.text() for section in sections))


def report_html(sections: Iterable[Section], heading: str) -> str:
    """The sections, their titles as headings such as ``h2``."""
    return "\n".join(
        f"<section>\n<{heading}>{escaped(section.title)}</{heading}>\n{section.html()}\n</section>"
        for section in sections
    )


class Report(ShortRepr, ABC):
    """A value that is printed, and shown in a notebook, as a report."""

    __slots__ = ()

    @abstractmethod
    def _sections(self) -> Iterable[Section]:
        """What the report shows, in its order."""

    def __str__(self) -> str:
        return report_text(self._sections())

    def _repr_html_(self) -> str:
        return report_html(self._sections(), "h4")


class Result(Report):
    """A report that is also written as JSON."""

    __slots__ = ()

    @abstractmethod
    def _document(self) -> dict[str, Any]:
        """What `to_json` writes, as `plain` takes it."""

    def to_json(self) -> str:
        """JSON with stable keys: times are in seconds, recipes TOML text.

        Numbers that are not finite are null. An infinite SQNR has ``"exact": true`` beside it.
        """
        return json.dumps(plain(self), indent=2)


def values_of(value: object, *names: str) -> dict[str, Any]:
    """Some attributes of a value, by their names."""
    return {name: getattr(value, name) for name in names}


def plain(value: Any) -> Any:
    """A value as JSON has it; a dataclass is what its own `to_json` gives, or its fields."""
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    if isinstance(value, Result):
        return plain(value._document())
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return plain(values_of(value, *(each.name for each in fields(value))))
    return value
