"""Keeps the caller's modes and defaults from changing what qrecipe computes."""

from __future__ import annotations

import functools
import linecache
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx
from torch.fx import graph_module
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch

from qrecipe.process.memory import lack_of_memory_said

P = ParamSpec("P")
R = TypeVar("R")


def neutral(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function outside of all torch modes; a decorator.

    Inside, the default dtype is float32 and the default device the CPU; inference mode, autocast,
    deterministic algorithms, and modes that observe or change torch's calls are off. Gradients stay
    on or off. The caller's functions (``forward``, ``evaluate``, a loader) see that state too. Lack
    of memory is an ``ExecutionError`` (QR407).
    """

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        with lack_of_memory_said(), sources_forgotten(), _without_modes(), _DEFAULTS.neutral():
            return function(*args, **kwargs)

    return computed


@contextmanager
def _without_modes() -> Iterator[None]:
    """Leave the modes of this thread."""
    with ExitStack() as stack:
        grad = torch.is_grad_enabled()
        for _ in range(torch._C._len_torch_function_stack()):
            stack.callback(_push_mode, _pop_mode())  # type: ignore[no-untyped-call]
        for _ in range(torch._C._len_torch_dispatch_stack()):
            stack.callback(dispatch._push_mode, dispatch._pop_mode())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


_Settings = tuple[torch.dtype, int]
"""The default dtype, and whether algorithms must be deterministic."""

_NEUTRAL: _Settings = (torch.float32, 0)


class _Defaults:
    """Settings of the process: neutral while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._former: _Settings | None = None

    @contextmanager
    def neutral(self) -> Iterator[None]:
        with self._lock:
            self._calls += 1
            found = _settings()
            if found != _NEUTRAL:
                self._former = found
                _set(_NEUTRAL)
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0 and self._former is not None:
                    _set(self._former)
                    self._former = None


_DEFAULTS = _Defaults()


def _settings() -> _Settings:
    return torch.get_default_dtype(), torch.get_deterministic_debug_mode()


def _set(settings: _Settings) -> None:
    torch.set_default_dtype(settings[0])
    torch.set_deterministic_debug_mode(settings[1])


_LOCK = threading.Lock()
_OURS: set[str] = set()
"""The keys of sources that were added during our calls, of graphs that may still be there."""


@contextmanager
def sources_forgotten() -> Iterator[None]:
    """Forget the source of each graph that is made inside, as soon as the graph is gone.

    A graph that is only collected later is forgotten at the end of a later call.
    """
    kept = graph_module._loader.eval_cache
    before = set(kept)
    try:
        yield
    finally:
        with _LOCK:
            _OURS.update(set(kept) - before)
            for key in _OURS - set(_living(fx.GraphModule)):
                kept.pop(key, None)
                linecache.cache.pop(key, None)
                _OURS.discard(key)


def _living(kind: type[Any]) -> Iterator[str]:
    """The keys of all graphs that are there: each is the only instance of its class."""
    each: type[Any]
    for each in kind.__subclasses__():
        forward = vars(each).get("forward")
        if isinstance(forward, FunctionType):
            yield forward.__code__.co_filename
        yield from _living(each)
