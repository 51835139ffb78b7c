"""State of the whole process that is changed for a moment: by one thread at a time, and put back.

Where several are changed, the engine comes first (`fx.execution.engine` has a lock of its own), so
that no two threads wait for each other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import _symbolic_trace as symbolic_trace

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Keep the other threads of qrecipe from changing the process."""
    with _LOCK:
        yield


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Leave the caller's random numbers where they are, whatever is drawn inside."""
    with alone(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def traced_alone() -> Iterator[None]:
    """Let `torch.fx` trace for this thread alone.

    While it traces it replaces ``nn.Module.__call__`` and ``__getattr__`` of the whole process, and
    tells everybody who asks that it traces. Inside, all of that holds for this thread, and models
    in others run as ever.
    """
    with alone():
        former = symbolic_trace._new_patcher
        symbolic_trace._new_patcher = _patcher_of_this_thread
        try:
            yield
        finally:
            symbolic_trace._new_patcher = former


class _ThisThread:
    """True in the thread that made it, until it is over."""

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
    """Stands in for torch's ``_new_patcher``; what it patches is put back on the way out."""
    tracing = _ThisThread()
    symbolic_trace._is_fx_tracing_flag = tracing  # type: ignore[assignment]
    try:
        with _Patcher(tracing) as patcher:
            yield patcher
    finally:
        tracing.end()
