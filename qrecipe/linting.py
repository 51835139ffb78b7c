"""Warnings, save those that the recipe's ``[lint] ignore`` names."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from qrecipe.errors import Finding, QRecipeWarning
from qrecipe.schema import LintTable


def warn(finding: Finding, lint: LintTable) -> None:
    """Warn with ``QRecipeWarning`` unless the recipe's author has accepted this code."""
    if finding.code not in lint.ignore:
        warnings.warn(str(finding), QRecipeWarning, stacklevel=_callers_level())


_HERE = Path(__file__).parent


def _callers_level() -> int:
    """How far up the stack the caller's code begins, as ``warnings.warn`` counts from `warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_HERE):
        frame, level = frame.f_back, level + 1
    return level
