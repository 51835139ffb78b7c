"""Counts the items of a TOML or JSON text before it is parsed.

Parsing a megabyte of brackets or dots takes gigabytes and minutes; counting them, milliseconds.
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
    """The structure of a TOML text: the text without strings and comments."""
    return _OPAQUE.sub("", text)


def item_count(outline: str) -> int:
    """The number of keys, key parts and array elements of an outline, or slightly more."""
    return sum(map(outline.count, _TOML_MARKS))


def json_count(text: str) -> int:
    """The number of values of a JSON text, or more if its strings contain punctuation."""
    return sum(map(text.count, _JSON_MARKS))


def depth(outline: str) -> int:
    """How deep the brackets of an outline are nested, including headers."""
    return max(accumulate(map(_STEPS.__getitem__, _BRACKET.findall(outline))), default=0)


def longest_key(outline: str) -> int:
    """The number of parts of the longest dotted key of an outline, at least 1."""
    if "." not in outline:
        return 1
    return 1 + max(piece.count(".") for piece in _BETWEEN_KEYS.split(outline))
