"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from qrecipe.errors.findings import SHOWN
from qrecipe.errors.text import quoted_whole

_LONGEST_NAME = 100
_MOST_COMPARED = 2_000


_suggestions_left: ContextVar[int | None] = ContextVar("_suggestions_left", default=None)


@contextmanager
def few_suggestions() -> Iterator[None]:
    """Suggest names for as many findings inside as a report shows: comparing names is slow."""
    token = _suggestions_left.set(SHOWN)
    try:
        yield
    finally:
        _suggestions_left.reset(token)


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Up to ``count`` names that a misspelled ``name`` may mean, the likeliest first."""
    if len(name) > _LONGEST_NAME:  # comparing takes quadratic time
        return []
    left = _suggestions_left.get()
    if left is not None:
        _suggestions_left.set(left - 1)
        if left <= 0:
            return []
    likely = sorted(known, key=lambda other: abs(len(other) - len(name)))[:_MOST_COMPARED]
    but_for_case = [other for other in likely if other.lower() == name.lower()]
    if but_for_case:
        return but_for_case[:count]
    return difflib.get_close_matches(name, likely, n=count, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """``did you mean "x"?``, or None if no known name is close."""
    return next((f"did you mean {quoted_whole(each)}?" for each in nearest(name, known)), None)
