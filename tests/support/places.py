"""Where the project and these modules stand, and which tests there are."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent


@cache
def functions_of(path: str | Path) -> set[str]:
    """The names of the functions of a file, its path from the root of the project."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
