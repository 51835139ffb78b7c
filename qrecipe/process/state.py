"""State of the whole process that one thread at a time changes temporarily.

To avoid deadlocks, the engine comes first (`execution.engine` has a lock of its own).
"""

from __future__ import annotations

import functools
import io
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch.fx import _symbolic_trace as symbolic_trace

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Keep qrecipe's other threads from changing the process."""
    with _LOCK:
        yield


@contextmanager
def replaced(names: dict[str, Any], ours: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the globals of a module have these values; to be used `alone`."""
    former = {name: names[name] for name in ours}
    names.update(ours)
    try:
        yield
    finally:
        names.update(former)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restore the state of the random number generators afterwards."""
    with alone(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def unheard() -> Iterator[None]:
    """Keep off the terminal what torch.export prints of what it cannot do, and torchao logs."""
    with alone(), redirect_stderr(io.StringIO()):
        former = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(former)


@contextmanager
def traced_alone() -> Iterator[None]:
    """Let `torch.fx` trace for this thread alone.

    While tracing, torch replaces ``nn.Module.__call__`` and ``__getattr__`` in the whole process
    and sets a global flag. Inside, this only affects this thread; models in others run as usual.
    """
    with alone():
        former = symbolic_trace._new_patcher
        symbolic_trace._new_patcher = _patcher_of_this_thread
        try:
            yield
        finally:
            symbolic_trace._new_patcher = former


class _ThisThread:
    """True in the thread that created it, until `end`."""

    def __init__(self) -> None:
        self._thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return self._thread == threading.get_ident()

    def end(self) -> None:
        self._thread = None


class _Patcher(symbolic_trace._Patcher):
    def __init__(self, tracing: _ThisThread) -> None:
        super().__init__()
        self._tracing = tracing

    def patch_method(self, cls: type, name: str, new_fn: Any, deduplicate: bool = True) -> None:
        former = getattr(cls, name)
        tracing = self._tracing

        @functools.wraps(new_fn)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if tracing else former)(*args, **kwargs)

        super().patch_method(cls, name, patched, deduplicate)


@contextmanager
def _patcher_of_this_thread() -> Iterator[symbolic_trace._Patcher]:
    """Replaces torch's ``_new_patcher``; what it patches is restored on exit."""
    tracing = _ThisThread()
    symbolic_trace._is_fx_tracing_flag = tracing  # type: ignore[assignment]
    try:
        with _Patcher(tracing) as patcher:
            yield patcher
    finally:
        tracing.end()
