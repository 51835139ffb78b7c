"""Warnings that one thread holds back, without lasting filters in the process.

``warnings.catch_warnings`` restores the filters that it found: where two threads use it at once,
the later one restores those of the earlier one, and they stay.
"""

from __future__ import annotations

import importlib
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Notice = tuple[str, type[Warning]]
"""A regular expression for the beginning of a message, and its category."""


class _InThisThread:
    """The pattern of a filter, which matches in the thread that made it and in no other."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._thread = threading.get_ident()

    def match(self, text: str) -> bool:
        here = self._thread == threading.get_ident()
        return here and self._pattern.match(text) is not None


@contextmanager
def held_back(notices: Sequence[Notice]) -> Iterator[None]:
    """Ignore such warnings inside a ``with``, in this thread alone."""
    home: list[Any] = warnings.filters  # type: ignore[assignment]
    added = [("ignore", _InThisThread(text), category, None, 0) for text, category in notices]
    home[:0] = added
    try:
        yield
    finally:
        _remove(added, home)
        if warnings.filters is not home:  # a catch_warnings elsewhere has copied them meanwhile
            _remove(added, warnings.filters)  # type: ignore[arg-type]


def import_aside(module: str) -> None:
    """Import what adds filters of its own, or imports what does, and take those out again."""
    before = list(warnings.filters)
    importlib.import_module(module)
    found = [each for each in warnings.filters if each not in before]
    _remove([each for each in found if not isinstance(each[1], _InThisThread)], warnings.filters)  # type: ignore[arg-type]


def _remove(added: Sequence[Any], filters: list[Any]) -> None:
    for each in added:
        if each in filters:
            filters.remove(each)
