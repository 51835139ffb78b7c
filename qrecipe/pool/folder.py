"""The folder of a parcel. If its owner is killed, the next call on this machine removes it."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PREFIX = "qrecipe-pool-"
_OWNER = "owner"
"""A file that names a machine; the folder's owner has it locked as long as it lives."""

_fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder of ``tempfile``, which only this user may read, inside the ``with``."""
    if _fcntl is None:
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
            yield Path(name)
        return
    _remove_abandoned()
    folder = tempfile.TemporaryDirectory(prefix=_PREFIX)
    owner = _marked(Path(folder.name))
    try:
        yield Path(folder.name)
    finally:
        folder.cleanup()
        os.close(owner)


def _marked(folder: Path) -> int:
    """Let the folder have an owner; the file has its name once it is locked, if it can be."""
    new = folder / "new"
    owner = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with suppress(OSError):  # a file system without locks
        os.write(owner, platform.node().encode())
        _fcntl.flock(owner, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        new.rename(folder / _OWNER)
    return owner


def _remove_abandoned() -> None:
    """Remove the folders of this user whose owner on this machine is dead.

    Locks of another machine may not be seen here.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            owner = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                _fcntl.flock(owner, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
                if os.read(owner, 1000) == platform.node().encode():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)
