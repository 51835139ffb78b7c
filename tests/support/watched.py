"""What Python does while something is read: an audit hook, on where it is wanted."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from places import ROOT

_ACTIONS = frozenset(
    {
        *("exec", "compile", "import", "open", "os.system", "os.exec", "os.fork", "os.posix_spawn"),
        *("subprocess.Popen", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir"),
        *("os.putenv", "os.symlink", "os.link", "os.chmod", "shutil.rmtree", "tempfile.mkstemp"),
        *("pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.__new__", "code.__new__"),
        *("glob.glob", "pathlib.Path.glob", "urllib.Request", "webbrowser.open", "builtins.input"),
    }
)

_watched: list[tuple[str, tuple[Any, ...]]] | None = None
_is_hooked = False


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The audit events of what runs inside: names and arguments.

    A hook cannot be taken away again: call it in a process of its own.
    """
    global _watched, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)
        _is_hooked = True
    _watched = events = []
    try:
        yield events
    finally:
        _watched = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event in _ACTIONS:
        _watched.append((event, arguments))


def forbidden(events: Iterable[tuple[str, tuple[Any, ...]]], *trees: Path) -> list[str]:
    """The events that are more than reading files of the trees, of qrecipe, or what is installed.

    Looking at a folder or globbing it is allowed where opening its files is.
    """
    return [
        f"{event} {arguments!r:.200}"
        for event, arguments in events
        if not _may(event, arguments, [*map(_real, trees), *_ALLOWED])
    ]


def _real(path: Path) -> str:
    return os.path.realpath(path) + os.sep


_ALLOWED = [
    _real(ROOT / "recipes"),
    _real(ROOT / "qrecipe"),
    *(_real(Path(sysconfig.get_path(name))) for name in ("purelib", "platlib", "stdlib")),
    *(_real(Path(entry or ".")) for entry in sys.path),  # where distributions are looked for
]
_LOOKS = frozenset({"os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob"})


def _may(event: str, arguments: tuple[Any, ...], allowed: list[str]) -> bool:
    if event == "pathlib.Path.glob":
        return True  # asks os.scandir, which is watched
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (mode and "r" not in mode)
        return not writes and (_is_step(path, mode, flags) or _is_inside(path, allowed))
    return event in _LOOKS and _is_inside(arguments[0], allowed)


def _is_step(path: object, mode: str | None, flags: int) -> bool:
    """Whether it is a plain name in a folder that is open already, and no link is followed."""
    is_name = isinstance(path, str) and path not in (".", "..") and os.sep not in path
    return is_name and mode is None and bool(flags & os.O_NOFOLLOW)


def _is_inside(path: object, allowed: list[str]) -> bool:
    if isinstance(path, int):  # a file that is open already
        return True
    real = os.path.realpath(os.fspath(path)) + os.sep  # type: ignore[call-overload]
    return any(real.startswith(tree) for tree in allowed)
