"""tomli's errors as helpful findings: where, what, and how to fix it."""

from __future__ import annotations

import re
from dataclasses import replace

import tomli

from qrecipe.errors.findings import Finding, Location
from qrecipe.errors.text import one_line
from qrecipe.recipe.toml.positions import Lines, repeated_key

_OPEN_STRING = "the string is not closed"

_WORDS: dict[str, tuple[str, str]] = {
    "Invalid statement": (
        "a line cannot start like this",
        "a line is KEY = VALUE, a [table] or a # comment",
    ),
    "Invalid initial character for a key part": (
        "a key is missing",
        'a key is letters, digits, "-" and "_", or quoted',
    ),
    "Expected newline or end of document after a statement": (
        "there is more after the end of the statement",
        "write each key on a line of its own",
    ),
    "Unclosed array": ("the array is not closed", 'separate items with ",", and end it with "]"'),
    "Unclosed inline table": (
        "the inline table is not closed",
        'separate pairs with ",", and end it with "}"',
    ),
    "Expected ']' at the end of a table declaration": ("the header is not closed", 'add "]"'),
    "Expected ']]' at the end of an array declaration": ("the header is not closed", 'add "]]"'),
    "Unescaped '\\' in a string": (
        "the backslash is not a valid escape",
        "double it, or put the string in 'single quotes'",
    ),
    "Invalid date or datetime": ("there is no such date", "strings must be quoted"),
}
"""tomli's message -> ours, and the hint."""

_OPEN_TO_THE_END = {'Expected "\'"': "'", "Expected \"'''\"": "'''", "Unterminated string": None}
"""tomli's messages about unclosed strings, with their quotes."""

_SET_TWICE = re.compile("Cannot (overwrite|declare|redefine)|Duplicate inline table key")
_COMPLETE = re.compile("Cannot mutate immutable namespace")
_CHARACTER = re.compile("(Illegal|Found invalid) character")
_LONGEST_KEY = 80
_LONG_NUMBER = re.compile(r"(?<=[=,\[\s])[+-]?[0-9][0-9_]{500,}")


def syntax_finding(error: tomli.TOMLDecodeError, file: str) -> Finding:
    """Why a text is not valid TOML (QR004)."""
    lines = Lines(error.doc, file)
    if _SET_TWICE.match(error.msg):
        is_header = error.msg.startswith("Cannot declare")
        hint = "write all its keys under one header" if is_header else "remove one of the two"
        return _repeated(error, lines, "is set twice", hint)
    if _COMPLETE.match(error.msg):
        hint = "write all its contents between its brackets"
        return _repeated(error, lines, "is complete and cannot be extended", hint)
    if error.msg in _OPEN_TO_THE_END:
        is_single = error.doc.count('"""') % 2 == 0
        quotes = _OPEN_TO_THE_END[error.msg] or ('"' if is_single else '"""')
        start, hint = error.doc.rindex(quotes), f"end it with {quotes}"
        return _finding(_OPEN_STRING, lines.location(start, error.pos), hint)
    said, hint_or_none = _words(error.msg, error.doc, error.pos)
    start, end = error.pos, error.pos + 1
    if error.msg.startswith("Unescaped"):  # tomli's position is after the escape
        start, end = start - 2, start
    return _finding(said, lines.location(start, end), hint_or_none)


def long_number_finding(text: str, file: str) -> Finding:
    """The finding for a number that Python will not read (QR004)."""
    text = text.replace("\r\n", "\n")
    match = _LONG_NUMBER.search(text)
    start, end = match.span() if match else (0, 0)
    return _finding("a number has too many digits", Lines(text, file).location(start, end))


def _words(message: str, text: str, at: int) -> tuple[str, str | None]:
    character = text[at : at + 1]
    if _CHARACTER.match(message):
        return _odd_character(character)
    if message == "Invalid value":
        return _no_value(text, at)
    if message.startswith("Expected '='"):
        return _no_equals_sign(character)
    if message.startswith("Expected newline") and re.match("[0-9][0-9_]", text[at - 1 : at + 1]):
        hint = "leading zeros are not allowed, underscores only between digits"
        return "this is not a number", hint
    return _WORDS.get(message, (message[:1].lower() + message[1:200], None))


def _odd_character(character: str) -> tuple[str, str]:
    if character == "\n":
        return _OPEN_STRING, "end it on the same line with the quote that it starts with"
    code = f"{ord(character):04x}"
    return f"the control character U+{code.upper()}", rf'write it as "\u{code}" in a string'


def _no_value(text: str, at: int) -> tuple[str, str | None]:
    word = text[at : at + 5].rstrip().lower()
    if word in ("true", "false"):
        return "this is not a value", f"write {word}"
    if text[at : at + 1] in ("", "\n", "#", ",", "]", "}"):
        return "a value is missing", None
    return "this is not a value", 'strings must be quoted, "like this"'


def _no_equals_sign(character: str) -> tuple[str, str]:
    if character in "\n#\"'[{:" or (character.isascii() and character.isalnum()):
        return 'a key without "="', "write KEY = VALUE"
    return "this cannot be part of a key", "keys with other characters must be quoted"


def _repeated(error: tomli.TOMLDecodeError, lines: Lines, what: str, hint: str) -> Finding:
    """The finding for a key that occurs earlier in the text."""
    places = repeated_key(error.doc[: error.pos])
    if places is None:
        return _finding(f"the key {what}", lines.location(error.pos, error.pos + 1), hint)
    first, second = places
    message = f"{one_line(error.doc[slice(*second)])[:_LONGEST_KEY]} {what}"
    finding = _finding(message, lines.location(*second), hint)
    return replace(finding, related=(("set first", lines.location(*first)),))


def _finding(said: str, at: Location, hint: str | None = None) -> Finding:
    return Finding("QR004", f"invalid TOML: {said}", at, hint)
