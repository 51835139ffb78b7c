"""Warnings, except those that the recipe ignores."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from qrecipe.errors.findings import Finding, QRecipeWarning, error_from

_COLLECTED: ContextVar[list[Finding] | None] = ContextVar("collected", default=None)


def warn(finding: Finding, ignore: Collection[str]) -> None:
    """Warn with ``QRecipeWarning`` unless the code is in ``ignore``."""
    collected = _COLLECTED.get()
    if finding.code in ignore:
        return
    if collected is None:
        warnings.warn(str(finding), QRecipeWarning, stacklevel=_callers_level())
    else:
        collected.append(finding)


@contextmanager
def collected() -> Iterator[list[Finding]]:
    """Collect the warnings that this thread gives inside a ``with``, instead of giving them."""
    findings: list[Finding] = []
    token = _COLLECTED.set(findings)
    try:
        yield findings
    finally:
        _COLLECTED.reset(token)


def settle(findings: Iterable[Finding], ignore: Collection[str]) -> None:
    """Raise those that are errors, together; if there are none, warn of the rest."""
    found = list(findings)
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:
        raise error_from(errors)
    for finding in found:
        warn(finding, ignore)


_HERE = Path(__file__).parents[1]


def _callers_level() -> int:
    """The ``stacklevel`` of the first frame outside this package, counted from `warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if "importlib" not in file and not Path(file).is_relative_to(_HERE):
            break  # it neither runs this package nor imports a part of it
        frame = frame.f_back
        level += "importlib._bootstrap" not in frame.f_code.co_filename  # not counted by `warnings`
    return level
