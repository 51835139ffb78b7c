"""The positions of all keys and values of a TOML text.

The scanner only sees text that tomli has accepted, so it needs no error handling of its own. Time
and memory are linear in the text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

import tomli

from qrecipe.errors.findings import Location
from qrecipe.errors.text import printable

KeyPath = tuple[str | int, ...]
"""The path to a value: keys of tables and indices of arrays."""

MAX_DEPTH = 100
"""How deep a recipe may be nested; the format itself needs seven levels."""

_BLANK = re.compile(r"(?:[ \t\n]+|#[^\n]*){0,100}")  # bounded: each repetition takes memory
_SPACE = re.compile(r"[ \t]*")
_BASIC_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_KEY_PART = re.compile(rf"[A-Za-z0-9_-]+|{_BASIC_STRING}|'[^']*'", re.DOTALL)
_SCALAR = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"{3,5}'
    r"|'''.*?'{3,5}"
    rf"|{_BASIC_STRING}|'[^']*'"
    r"|\d{4}-\d\d-\d\d \d[^\s,\]}#]*"  # a date and a time separated by a space
    r"|[^\s,\]}#]+",
    re.DOTALL,
)

_Span = tuple[int, int]


class NestingError(Exception):
    """The text is nested more than `MAX_DEPTH` levels deep."""


class _UnfinishedError(Exception):
    """The text ends too early, or is not TOML."""


class Lines:
    """Converts offsets in a text to locations in its file."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self._lines = text.split("\n")
        self._printable: dict[int, str] = {}
        self._starts = [0, *accumulate(len(line) + 1 for line in self._lines)]

    def location(self, start: int, end: int) -> Location:
        """The span from ``start`` to ``end`` (exclusive), to the end of its first line."""
        line = min(bisect_right(self._starts, start), len(self._lines))
        first = self._starts[line - 1]
        if line not in self._printable:  # all locations on a line share its text
            self._printable[line] = printable(self._lines[line - 1])
        source = self._printable[line]
        column = start - first + 1
        last = min(end - first, len(source)) + 1
        return Location(self.file, line, column, max(last, column + 1), source)


@dataclass(slots=True)
class _Node:
    """A key or an array element: its position and its contents."""

    depth: int
    key: _Span
    value: _Span | None = None
    is_array_of_tables: bool = False
    children: dict[str | int, _Node] = field(default_factory=dict)

    def child(self, name: str | int, key: _Span) -> _Node:
        """The child of that name, added if necessary."""
        if name not in self.children:
            if self.depth >= MAX_DEPTH:
                raise NestingError
            self.children[name] = _Node(self.depth + 1, key)
        return self.children[name]

    def table(self) -> _Node:
        """Where keys under this name belong: for an array of tables, its last element."""
        return self.children[len(self.children) - 1] if self.is_array_of_tables else self


class Spans:
    """The positions of all keys and values of one text.

    ``text`` is the text with CRLF replaced by LF, as in tomli; offsets refer to it.
    """

    def __init__(self, text: str, file: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.file = file
        self._lines = Lines(self.text, file)
        self._root = _Scanner(self.text).document()

    def key(self, path: KeyPath) -> Location:
        """The location of the key; for an array element, of the element.

        Raises KeyError if the text has no such path.
        """
        return self._lines.location(*self._node(path).key)

    def value(self, path: KeyPath) -> Location:
        """The location of the value, to the end of its first line.

        For a table of headers or dotted keys, which has no value of its own, that of the key.
        Raises KeyError if the text has no such path.
        """
        return self._lines.location(*self.value_offsets(path))

    def value_offsets(self, path: KeyPath) -> tuple[int, int]:
        """Start and end of the whole value in ``text``, or of the key if it has no value."""
        node = self._node(path)
        return node.value or node.key

    def start(self) -> Location:
        """The start of the text, for findings about missing keys."""
        return Location(self.file, 1, 1, 1)

    def known(self, path: KeyPath) -> KeyPath:
        """The path without the steps that the text does not have."""
        node, steps = self._root, list[str | int]()
        for step in path:
            if step in node.children:
                node = node.children[step]
                steps.append(step)
        return tuple(steps)

    def __contains__(self, path: KeyPath) -> bool:
        return self.known(path) == path

    def _node(self, path: KeyPath) -> _Node:
        node = self._root
        for step in path:
            node = node.children[step]
        return node


def repeated_key(text: str) -> tuple[_Span, _Span] | None:
    """Where a key is set first and where again, in a text up to where tomli rejected it."""
    scanner = _Scanner(text)
    with suppress(_UnfinishedError, NestingError):
        scanner.document()
    return scanner.repeated


class _Scanner:
    """One pass over a text that tomli has accepted.

    ``repeated`` has the positions of the last key that occurred before, which is not an error in
    itself, as tables may be written in parts.
    """

    def __init__(self, text: str) -> None:
        self.repeated: tuple[_Span, _Span] | None = None
        self._text = text
        self._position = 0

    def document(self) -> _Node:
        root = table = _Node(0, (0, 0))
        self._skip_blank()
        while self._position < len(self._text):
            if self._at("["):
                table = self._header(root)
            else:
                self._pair(table)
            self._skip_blank()
        return root

    def _header(self, root: _Node) -> _Node:
        """``[a.b]`` or ``[[a.b]]``; returns the table that the next lines fill."""
        brackets = 2 if self._text.startswith("[[", self._position) else 1
        self._position += brackets
        node, span, is_new = self._key(root)
        self._position += brackets
        if brackets == 1:
            node.key = span
            return node
        node.is_array_of_tables = is_new or node.is_array_of_tables
        return node.child(len(node.children), span)

    def _pair(self, table: _Node) -> None:
        node, _, _ = self._key(table)
        self._position += 1  # the equals sign
        self._skip(_SPACE)
        self._value(node)

    def _key(self, table: _Node) -> tuple[_Node, _Span, bool]:
        """What a dotted key in a table stands for, where its last part is, and whether it is new.

        Skips the blanks after it.
        """
        while True:
            self._skip(_SPACE)
            start = self._position
            name = _decoded(self._skip(_KEY_PART))
            span = start, self._position
            is_new = name not in table.children
            if not is_new:
                self.repeated = table.children[name].key, span
            node = table.child(name, span)
            self._skip(_SPACE)
            if not self._at("."):
                return node, span, is_new
            self._position += 1
            table = node.table()

    def _value(self, node: _Node) -> None:
        start = self._position
        if self._at("["):
            for index in self._items("]"):
                element = node.child(index, (self._position, self._position))
                self._value(element)
                element.key = element.value or element.key
        elif self._at("{"):
            for _ in self._items("}"):
                self._pair(node)
        else:
            self._skip(_SCALAR)
        node.value = (start, self._position)

    def _items(self, closing: str) -> Iterator[int]:
        """Stop at each item between brackets, and finally after the closing one."""
        self._position += 1
        index = 0
        self._skip_blank()
        while not self._at(closing):
            yield index
            index += 1
            self._skip_blank()
            if self._at(","):
                self._position += 1
                self._skip_blank()
        self._position += 1

    def _at(self, character: str) -> bool:
        return self._text.startswith(character, self._position)

    def _skip_blank(self) -> None:
        while self._skip(_BLANK):
            pass

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._position)
        if match is None:
            raise _UnfinishedError
        self._position = match.end()
        return match.group()


def _decoded(part: str) -> str:
    if part[0] not in "\"'":
        return part
    if "\\" not in part:
        return part[1:-1]
    return str(tomli.loads(f"key = {part}")["key"])
