"""Warnings, except those whose codes the caller ignores."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from qrecipe.errors.findings import Finding, QRecipeWarning


def warn(finding: Finding, ignore: Collection[str]) -> None:
    """Warn with ``QRecipeWarning`` unless ``ignore`` (the recipe's) holds the code."""
    if finding.code not in ignore:
        warnings.warn(str(finding), QRecipeWarning, stacklevel=_callers_level())


_HERE = Path(__file__).parents[1]


def _callers_level() -> int:
    """How far up the stack the caller's code begins, as ``warnings.warn`` counts from `warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_HERE):
        frame, level = frame.f_back, level + 1
    return level
