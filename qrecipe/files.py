"""Atomic file writes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from qrecipe.errors.findings import Finding, RecipeReferenceError
from qrecipe.errors.text import one_line, shown


def write_atomically(path: Path, text: str) -> None:
    """Write a file's text atomically.

    Raises RecipeReferenceError (QR001) if it cannot be written.
    """
    try:
        replace_file(path, [text.encode()])
    except (OSError, ValueError) as error:
        message = f"cannot write {shown(str(path))}: {why_not(error)}"
        raise RecipeReferenceError(Finding("QR001", message)) from None


def check_replaceable_file(path: Path) -> None:
    """Check that `replace_file` could write there, before there is anything to write.

    Raises OSError, or ValueError if it is not a regular file or not a path.
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


def replace_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Replace a file atomically by what ``pieces`` gives, one after another.

    Raises OSError, or ValueError if it is not a regular file or not a path.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError("not a regular file")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines(pieces)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(_mode(target))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def why_not(error: OSError | ValueError) -> str:
    """The operating system's reason, on one line."""
    return one_line((getattr(error, "strerror", None) or str(error)).lower())


def _mode(target: Path) -> int:
    """The permissions of the replaced file, or the default ones."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
