"""Warnings, save those that the recipe's ``[lint] ignore`` names."""

from __future__ import annotations

import warnings

from qrecipe.errors import Finding, QRecipeWarning
from qrecipe.schema import LintTable


def warn(finding: Finding, lint: LintTable) -> None:
    """Warn with ``QRecipeWarning`` unless the recipe's author has accepted this code."""
    if finding.code not in lint.ignore:
        warnings.warn(str(finding), QRecipeWarning, stacklevel=3)
