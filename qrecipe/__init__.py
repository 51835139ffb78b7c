"""A declarative recipe compiler for PyTorch quantization.

Public names are imported on first use, so that checking a recipe does not need torch. They are
listed in `__init__.pyi`, which type checkers read too.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {
    alias.name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
"""The module that defines each public name."""

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qrecipe' has no attribute {name!r}")
    value = getattr(import_module(str(_HOME[name])), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
