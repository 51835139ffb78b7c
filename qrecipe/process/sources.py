"""The source of generated code, which torch.fx keeps for tracebacks until the process ends."""

from __future__ import annotations

import linecache
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import fx
from torch.fx import graph_module

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
