"""Warnings, except those that the recipe ignores."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

from qrecipe.errors.findings import CODES, Finding, QRecipeWarning, error_from


def warn(finding: Finding, ignore: Collection[str]) -> None:
    """Warn with ``QRecipeWarning`` unless the code is in ``ignore``."""
    if finding.code not in ignore:
        warnings.warn(str(finding), QRecipeWarning, stacklevel=_callers_level())


def settle(findings: Iterable[Finding], ignore: Collection[str]) -> None:
    """Raise those that are errors, together; if there are none, warn of the rest."""
    found = list(findings)
    errors = [finding for finding in found if CODES[finding.code].error is not None]
    if errors:
        raise error_from(errors)
    for finding in found:
        warn(finding, ignore)


_HERE = Path(__file__).parents[1]


def _callers_level() -> int:
    """The ``stacklevel`` of the first frame outside this package, counted from `warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_HERE):
        frame, level = frame.f_back, level + 1
    return level
