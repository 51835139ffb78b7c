"""Text that is safe and short enough to show."""

from __future__ import annotations

import json
import re

# control characters but tab and line feed, separators of lines, overrides of the writing direction
# and halves of characters, which no encoding can write
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHOWN_WIDTH = 80


def printable(text: str) -> str:
    """The text without characters that could steer a terminal, each replaced by one."""
    return _UNPRINTABLE.sub("\ufffd", text)


def one_line(text: str) -> str:
    """As `printable`, on one line."""
    return printable(text).replace("\n", "\ufffd").replace("\t", " ")


def shown(value: object) -> str:
    """A value of a recipe on one line, short, as TOML writes it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "an array"
    if isinstance(value, float):
        return repr(value)
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _SHOWN_WIDTH else text[: _SHOWN_WIDTH - 1] + "…"


def counted(count: int, noun: str) -> str:
    """``1 batch``, ``3 batches``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}es" if noun.endswith("ch") else f"{count} {noun}s"


def quoted_whole(name: str) -> str:
    """A name as TOML writes it, however long: what is cut off could not be copied."""
    return printable(json.dumps(name, ensure_ascii=False))


def first_line(error: BaseException) -> str:
    """What a foreign exception says first, or its class where it says nothing."""
    try:
        text = str(error).strip()
    except (Exception, SystemExit):
        text = ""
    return text.splitlines()[0] if text else type(error).__name__
