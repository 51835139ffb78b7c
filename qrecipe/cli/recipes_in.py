"""The recipes in a folder, told from other TOML files by what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qrecipe.errors.findings import RecipeError
from qrecipe.recipe.toml.document import parse_document, read_text
from qrecipe.recipe.toml.writer import LOCK_SUFFIX

_TABLES = ("tensor", "qconfig", "rules")


def recipes_in(folder: Path) -> Iterator[str]:
    """The recipes in a folder and those below it, in order.

    Hidden folders and virtual environments are left out. A file that is no valid TOML counts as a
    recipe: nobody can tell that it is none.
    """
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not _is_left_out(here / name))
        for name in sorted(names):
            path = here / name
            if name.endswith(".toml") and not name.endswith(LOCK_SUFFIX) and _is_recipe(path):
                yield str(path)


def _is_left_out(folder: Path) -> bool:
    return folder.name.startswith(".") or (folder / "pyvenv.cfg").exists()


def _is_recipe(path: Path) -> bool:
    file = path.resolve()
    try:
        values = parse_document(read_text(file.parent, file, str(path)), str(path)).data
    except RecipeError as error:
        return [finding.code for finding in error.findings] == ["QR004"]
    return (
        isinstance(values.get("format"), int)
        or "extends" in values
        or any(isinstance(values.get(name), dict) for name in _TABLES)
    )
