"""How much stands in a text of TOML or JSON, told before anything is built from it.

A megabyte of brackets or dots takes gigabytes and minutes once it is parsed; counting them takes
milliseconds.
"""

from __future__ import annotations

import re
from itertools import accumulate

_OPAQUE = re.compile(
    r'"""[^"\\]*(?:(?:\\(?:.|\Z)|"(?!""))[^"\\]*)*(?:"{3,5}|\Z)'
    r"|'''.*?(?:'{3,5}|\Z)"
    r'|"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"?'
    r"|'[^'\n]*'?"
    r"|#[^\n]*",
    re.DOTALL,
)
_TOML_MARKS, _JSON_MARKS = ("=", ",", "[", "."), (",", ":", "[", "{")
_BRACKET = re.compile(r"[\[\]{}]")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_BETWEEN_KEYS = re.compile(r"[\n=,\[\]{}]")


def outline(text: str) -> str:
    """A TOML text without its strings and comments, so that all that is left is structure."""
    return _OPAQUE.sub("", text)


def item_count(outline: str) -> int:
    """The keys, parts of keys and array elements of an outline; a few more, never fewer."""
    return sum(map(outline.count, _TOML_MARKS))


def json_count(text: str) -> int:
    """The values of a JSON text, or more where its strings hold punctuation."""
    return sum(map(text.count, _JSON_MARKS))


def depth(outline: str) -> int:
    """How deep the brackets of an outline go, its headers included."""
    return max(accumulate(map(_STEPS.__getitem__, _BRACKET.findall(outline))), default=0)


def longest_key(outline: str) -> int:
    """The parts of the longest dotted key of an outline, or 1 where none has more."""
    if "." not in outline:
        return 1
    return 1 + max(piece.count(".") for piece in _BETWEEN_KEYS.split(outline))
