"""Atomic file writes, and reads that do not leave a folder."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qrecipe.errors.findings import QRecipeError, RecipeReferenceError
from qrecipe.errors.text import one_line, shown

_STEP_BY_STEP = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_INTO = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
_ONTO = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_inside(tree: Path, path: Path, most: int) -> bytes:
    """The content of a regular file inside a folder, to one byte more than ``most``.

    Both paths are absolute and without links, as `Path.resolve` gives them. The file is opened
    once, and no link is followed that has replaced a part of ``path`` since.

    Raises OSError, or ValueError if it is not a regular file or not a path.
    """
    handle = (_opened_step_by_step if _STEP_BY_STEP else _opened_and_compared)(tree, path)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"it is {'a directory' if stat.S_ISDIR(mode) else _NOT_REGULAR}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            return stream.read(most + 1)
    finally:
        os.close(handle)


def _opened_step_by_step(tree: Path, path: Path) -> int:
    *folders, name = path.relative_to(tree).parts
    at: int | None = None
    try:
        for folder in (str(tree), *folders):
            outer, at = at, os.open(folder, _INTO | os.O_NOFOLLOW, dir_fd=at)
            if outer is not None:
                os.close(outer)
        return os.open(name, _ONTO | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OSError(error.errno, _REPLACED) from None
        raise
    finally:
        if at is not None:
            os.close(at)


def _opened_and_compared(tree: Path, path: Path) -> int:
    """For systems that cannot open a file relative to a folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a directory")
    handle = os.open(path, _ONTO)
    if path.resolve() == path and os.path.samestat(os.fstat(handle), path.stat()):
        return handle
    os.close(handle)
    raise OSError(errno.ELOOP, _REPLACED)


_NOT_REGULAR = "not a regular file"
_REPLACED = "a link has replaced it, or a folder above it, while it was read"


@contextmanager
def failing_for(
    kind: type[QRecipeError], code: str, what: str, hint: str | None = None
) -> Iterator[None]:
    """What the operating system says about a file becomes an error of ours: ``what``, and why."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise kind.of(code, f"{what}: {why_not(error)}", hint=hint) from None


def path_text(
    path: object,
    what: str,
    hint: str | None = None,
    *,
    kind: type[QRecipeError] = RecipeReferenceError,
    code: str = "QR001",
) -> str:
    """A path as text; ``what`` says in the error what takes one, if it is something else."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise kind.of(code, f"{what}, not {shown(type(path).__name__)}", hint=hint)
    return text


def write_atomically(path: Path, text: str) -> None:
    """Write a file's text atomically.

    Raises RecipeReferenceError (QR001) if it cannot be written.
    """
    with failing_for(RecipeReferenceError, "QR001", f"cannot write {shown(str(path))}"):
        replace_file(path, lambda stream: stream.write(text.encode()))


def check_replaceable_file(path: Path) -> None:
    """Check that `replace_file` could write there, before there is anything to write.

    Raises OSError, or ValueError if it is not a regular file or not a path.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():
        raise ValueError(_NOT_REGULAR)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically by what ``write`` writes to a stream.

    Raises OSError, or ValueError if it is not a regular file or not a path.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(_NOT_REGULAR)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
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
