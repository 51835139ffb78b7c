"""Warnings ignored in one thread only.

``warnings.catch_warnings`` is not thread-safe: if two threads use it at once, the later one
restores the filters of the earlier one, and they stay.
"""

from __future__ import annotations

import importlib
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qrecipe.errors.findings import QRecipeWarning
from qrecipe.errors.warn import collected

Notice = tuple[str, type[Warning]]
"""A regular expression for the start of a message, and its category."""


class _InThisThread:
    """The pattern of a filter that only matches in the thread that created it."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._thread = threading.get_ident()

    def match(self, text: str) -> bool:
        here = self._thread == threading.get_ident()
        return here and self._pattern.match(text) is not None


@contextmanager
def held_back(notices: Sequence[Notice]) -> Iterator[None]:
    """Ignore such warnings inside a ``with``, in this thread only."""
    home: list[Any] = warnings.filters  # type: ignore[assignment]
    added = [("ignore", _InThisThread(text), category, None, 0) for text, category in notices]
    home[:0] = added
    try:
        yield
    finally:
        _remove(added, home)
        if (
            warnings.filters is not home
        ):  # a catch_warnings elsewhere has copied them in the meantime
            _remove(added, warnings.filters)  # type: ignore[arg-type]


@contextmanager
def unwarned() -> Iterator[None]:
    """Hold back our own warnings, where an earlier step has given them."""
    with held_back([("", QRecipeWarning)]), collected():
        yield


@contextmanager
def filters_kept() -> Iterator[None]:
    """Remove the warning filters that imports inside a ``with`` add."""
    before = list(warnings.filters)
    try:
        yield
    finally:
        added = [each for each in warnings.filters if each not in before]
        imported = [each for each in added if not isinstance(each[1], _InThisThread)]
        _remove(imported, warnings.filters)  # type: ignore[arg-type]


def import_aside(module: str) -> None:
    """Import a module and remove the warning filters that the import adds."""
    with filters_kept():
        importlib.import_module(module)


def _remove(added: Sequence[Any], filters: list[Any]) -> None:
    for each in added:
        if each in filters:
            filters.remove(each)
