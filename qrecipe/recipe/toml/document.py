"""Reads and parses recipe files, however hostile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tomli

from qrecipe.errors.findings import Location, RecipeReferenceError, RecipeSyntaxError
from qrecipe.errors.text import shown
from qrecipe.files import failing_for, read_inside
from qrecipe.recipe.toml.positions import MAX_DEPTH, NestingError, Spans
from qrecipe.recipe.toml.size_limits import depth, item_count, longest_key, outline
from qrecipe.recipe.toml.syntax_errors import long_number_finding, syntax_finding

MAX_BYTES = 2**20
"""The size limit of a recipe: 1 MiB."""

MAX_ITEMS = 20_000
"""The most keys and array elements that a recipe may have, including its bases."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A recipe's TOML data, with the position of each part.

    ``size`` is the number of keys and array elements, or slightly more.
    """

    file: str
    data: dict[str, Any]
    spans: Spans
    size: int


def read_text(tree: Path, path: Path, file: str) -> str:
    """The text of a recipe inside a folder, as `read_inside` reads it; ``file`` is for findings.

    Raises RecipeReferenceError (QR001) or RecipeSyntaxError (QR002, QR003).
    """
    with failing_for(RecipeReferenceError, "QR001", f"cannot read {shown(file)}"):
        content = read_inside(tree, path, MAX_BYTES)
    if len(content) > MAX_BYTES:
        raise _too_large(file)
    return _decode(content, file)


def parse_document(text: str, file: str) -> Document:
    """TOML text -> data and spans.

    Raises RecipeSyntaxError (QR002 to QR005).
    """
    half = _HALF_CHARACTER.search(text)
    if half is not None:
        line = text.count("\n", 0, half.start()) + 1
        what = f"has a lone surrogate: U+{ord(half[0]):04X}"
        _refuse_encoding(file, line, what, "read the file as UTF-8")
    if len(text.encode()) > MAX_BYTES:
        raise _too_large(file)
    if text.startswith("\ufeff"):
        _refuse_encoding(file, 1, "starts with a byte order mark", "save it as UTF-8 without BOM")
    size = _size(text, file)
    try:
        return Document(file, tomli.loads(text), Spans(text, file), size)
    except tomli.TOMLDecodeError as error:
        raise RecipeSyntaxError(syntax_finding(error, file)) from None
    except (RecursionError, NestingError):
        raise _too_deep(file) from None
    except ValueError:  # Python does not read integers of thousands of digits
        raise RecipeSyntaxError(long_number_finding(text, file)) from None


def _size(text: str, file: str) -> int:
    structure = outline(text)
    if max(depth(structure), longest_key(structure)) > MAX_DEPTH:  # tomli would be slow
        raise _too_deep(file)
    size = item_count(structure)
    if size > MAX_ITEMS:
        message = f"the recipe has more than {MAX_ITEMS:,} keys and values"
        hint = 'one glob can replace many names: "layer*.conv1"'
        raise RecipeSyntaxError.of("QR002", message, Location(file, 1, 1, 1), hint)
    return size


def _too_deep(file: str) -> RecipeSyntaxError:
    message = f"the recipe is nested more than {MAX_DEPTH} levels deep"
    hint = "is a bracket not closed, or a dotted key endless?"
    return RecipeSyntaxError.of("QR005", message, Location(file, 1, 1, 1), hint)


def _too_large(file: str) -> RecipeSyntaxError:
    message = f"the recipe is larger than {MAX_BYTES:,} bytes"
    return RecipeSyntaxError.of("QR002", message, Location(file, 1, 1, 1))


def _decode(content: bytes, file: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        _refuse_encoding(file, 1, "is UTF-16", "save it as UTF-8")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        _refuse_encoding(file, line, "is not text: it contains a NUL byte", None)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        _refuse_encoding(file, line, f"is not UTF-8: byte 0x{byte:02x}", "save it as UTF-8")


def _refuse_encoding(file: str, line: int, what: str, hint: str | None) -> NoReturn:
    raise RecipeSyntaxError.of("QR003", f"the recipe {what}", Location(file, line, 1, 1), hint)
