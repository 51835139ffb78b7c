"""Colour for what is printed on a terminal: severity, carets, verdicts. A pipe gets plain text."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, TextIO

from qrecipe.errors.findings import CODES

if TYPE_CHECKING:
    from rich.style import StyleType

_ERROR, _WARNING = "bold red", "bold yellow"
_HINT = "cyan"
_WORDS = {
    "green": ("quantized", "applied", "ok", "kept", "within, kept"),
    "cyan": ("passthrough",),
    "yellow": ("float", "unused", "shadowed", "not kept"),
    "red": ("unmatched", "unsupported", "failed"),
}
"""The words of verdicts, by their colour."""

_CELL = r"(?:^|(?<=  ))(?:{words})(?=  |:|$)(?![^\n]*\n─)"
"""Such a word alone in a cell of a table, or before a colon; not in a header, which is ruled."""


def write(text: str, stream: TextIO) -> None:
    """Print a text, in colour if the stream is a terminal that has it and the user wants it."""
    if not _has_colour(stream):
        print(text, file=stream)
        return
    # not at the top: a pipe does not wait for it
    from rich.console import Console
    from rich.text import Text

    shown = Text(text)
    for pattern, style in _STYLES:
        shown.highlight_regex(pattern, style)
    console = Console(file=stream, force_terminal=True, markup=False, emoji=False)
    console.print(shown, soft_wrap=True)


def _has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal with colours, and NO_COLOR (no-color.org) is not set."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")
    return wanted and stream.isatty()


def _of_severity(code: str) -> StyleType:
    return _ERROR if code in CODES and CODES[code].error is not None else _WARNING


_STYLES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"^error(?=: )", re.MULTILINE), _ERROR),
    (re.compile(r"^warning(?=: )", re.MULTILINE), _WARNING),
    (re.compile(r"\bQR\d{3}\b"), _of_severity),
    (re.compile(r"(?<=^      \| ).*\^.*$", re.MULTILINE), _HINT),
    (re.compile(r"(?<=^      \| ) *\^+", re.MULTILINE), _ERROR),
    *(
        (re.compile(_CELL.format(words="|".join(words)), re.MULTILINE), colour)
        for colour, words in _WORDS.items()
    ),
]
