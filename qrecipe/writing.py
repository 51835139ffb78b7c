"""Resolved values -> TOML text -> file."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qrecipe.errors.findings import Finding, RecipeReferenceError
from qrecipe.errors.text import one_line, shown

LOCK_SUFFIX = ".lock.toml"
"""How the names of lock files end: TOML as well, but no recipes."""

_TABLES = ("tensor", "qconfig", "rules", "calibration", "qat", "fx", "lint")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(values: Mapping[str, Any]) -> str:
    """A recipe's values as TOML, in the order of the format's documentation."""
    return "\n\n".join("\n".join(block) for block in _blocks(values)) + "\n"


def toml_value(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def toml_key(key: str) -> str:
    """A key, quoted where it has to be."""
    return key if _BARE.fullmatch(key) else _quoted(key)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a new text at once, or leaves it as it was.

    Raises RecipeReferenceError (QR001) if it cannot be written.
    """
    try:
        replace_file(path, text.encode())
    except (OSError, ValueError) as error:
        message = f"cannot write {shown(str(path))}: {why_not(error)}"
        raise RecipeReferenceError(Finding("QR001", message)) from None


def check_replaceable_file(path: Path) -> None:
    """Whether `replace_file` could write there, before there is something to write.

    Raises OSError, or ValueError for what is no regular file or no path.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():
        raise ValueError("not a regular file")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file at once, or leaves it as it was.

    Raises OSError, or ValueError for what is no regular file or no path.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError("not a regular file")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(_mode(target))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def why_not(error: OSError | ValueError) -> str:
    """What the system says about a file, in a few words of one line."""
    return one_line((getattr(error, "strerror", None) or str(error)).lower())


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced, or those of a new one."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _blocks(values: Mapping[str, Any]) -> Iterator[list[str]]:
    yield _pairs({key: value for key, value in values.items() if key not in _TABLES})
    for name in _TABLES:
        yield from _table_blocks(name, values.get(name, {}))


def _table_blocks(name: str, table: Mapping[str, Any]) -> Iterator[list[str]]:
    if name in ("tensor", "qconfig"):
        for key, inner in table.items():
            yield [f"[{name}.{toml_key(key)}]", *_pairs(inner)]
    elif name == "rules":
        if "global" in table:
            yield ["[rules]", f"global = {_rule(table['global'])}"]
        for tier in ("module_type", "function", "module_name"):
            if tier in table:
                rules = (f"{_quoted(key)} = {_rule(rule)}" for key, rule in table[tier].items())
                yield [f"[rules.{tier}]", *rules]
    elif table:
        yield [f"[{name}]", *_pairs(table)]


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{toml_key(key)} = {_paragraph(value) or _short(value)}" for key, value in table.items()
    ]


def _paragraph(value: Any) -> str | None:
    """A string of several lines as such."""
    if not isinstance(value, str) or "\n" not in value:
        return None
    lines = "\n".join(_quoted(line)[1:-1] for line in value.split("\n"))
    return f'"""\n{lines}"""'


def _short(value: Any) -> str:
    """A constructor without arguments is its name alone."""
    is_name = isinstance(value, Mapping) and value.keys() == {"name"}
    return toml_value(value["name"] if is_name else value)


def _rule(rule: Mapping[str, Any]) -> str:
    return toml_value(rule["qconfig"] if rule.keys() == {"qconfig"} else rule)


def _quoted(text: str) -> str:
    """A basic string; JSON escapes what TOML forbids, but for the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
