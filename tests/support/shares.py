"""Which of many equal cases always run, and which with the slow tests only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(count: int, values: Iterable[Any], *, first: int = 0) -> list[Any]:
    """Parameters: every so many of the values always, from the given one, the rest as slow."""
    return [
        pytest.param(value, marks=[] if at % count == first else [pytest.mark.slow])
        for at, value in enumerate(values)
    ]
