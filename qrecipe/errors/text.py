"""Text that is safe and short enough to show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from pydantic import ValidationError

# control characters except tab and line feed, line separators, bidirectional overrides and lone
# surrogates, which no encoding can write
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHOWN_WIDTH = 80


def printable(text: str) -> str:
    """The text with characters that could control a terminal replaced."""
    return _UNPRINTABLE.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Like `printable`, on one line."""
    return printable(text).replace("\n", "\ufffd").replace("\t", " ")


def shown(value: object) -> str:
    """A recipe value as TOML, shortened to one line."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "an array"
    if isinstance(value, float):
        return repr(value)
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _SHOWN_WIDTH else text[: _SHOWN_WIDTH - 1] + "…"


def shown_names(names: Iterable[str]) -> str:
    """Names as TOML strings, separated by commas."""
    return ", ".join(map(shown, names))


def counted(count: int, noun: str) -> str:
    """``1 batch``, ``3 batches``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}es" if noun.endswith("ch") else f"{count} {noun}s"


def quoted_whole(name: str) -> str:
    """A name as TOML writes it, never shortened, so that it can be copied."""
    return printable(json.dumps(name, ensure_ascii=False))


_PLACE = re.compile(r"Exception from \S+:\d+:|.*Check '.*' failed at \S+:\d+:")
"""A line with which OpenVINO says where in its code something failed."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says what, or its class if there is none."""
    try:
        lines = str(error).strip().splitlines()
    except (Exception, SystemExit):
        lines = []
    telling = (line for line in lines if _PLACE.fullmatch(line) is None)
    return next(telling, lines[0] if lines else type(error).__name__)


def first_problem(error: ValidationError) -> str:
    """Where the first problem is that Pydantic has found, and what it is."""
    first = error.errors(include_url=False)[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))


def finite_or_none(value: float | None) -> float | None:
    """The number, or None if JSON cannot express it."""
    return value if value is not None and math.isfinite(value) else None
