"""Texts that are only shown, which need not hold what a graph computes."""

from __future__ import annotations

import ast
import linecache
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch

_OURS = (Path(torch.__file__).parent, Path(__file__).parents[1])
_SHOWN = (ast.Assert, ast.Raise, ast.Expr)
"""Statements that keep no text: of an ``ast.Expr``, nobody reads the value."""


def is_shown(frame: FrameType) -> bool:
    """Whether the line that a frame is at only shows the texts that it makes.

    So do lines without a source, and those of torch.
    """
    name = frame.f_code.co_filename
    if any(map(Path(name).is_relative_to, _OURS)):
        return True
    at = frame.f_lineno
    around = [each for each in _statements(name) if each.lineno <= at <= (each.end_lineno or 0)]
    return not around or isinstance(max(around, key=_start), _SHOWN)


@lru_cache(maxsize=64)
def _statements(filename: str) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.stmt))


def _start(statement: ast.stmt) -> tuple[int, int]:
    return statement.lineno, statement.col_offset
