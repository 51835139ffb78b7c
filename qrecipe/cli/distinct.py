"""The files that a command writes differ from each other and from those that it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import typer

import qrecipe


def check_distinct(outputs: Mapping[str, str | None], reads: Iterable[str] = ()) -> None:
    """Raise BadParameter if writing one of these files would overwrite another of them.

    ``outputs`` are paths by option, ``reads`` the files that the command reads.
    """
    taken = {_real(path): "it is read from there: name another file" for path in reads}
    for option, path in outputs.items():
        if path is None:
            continue
        real = _real(path)
        if real in taken:
            raise typer.BadParameter(f"{path}: {taken[real]}", param_hint=option)
        taken[real] = f"{option} already writes this file"


def files_of(recipe: str) -> list[str]:
    """The files that a recipe is made of; names of recipes that are in no file are among them.

    Raises what `qrecipe.load_recipe` raises.
    """
    return [each.name for each in qrecipe.load_recipe(recipe).ingredients]


def _real(path: str) -> str:
    return os.path.realpath(path.replace("\0", ""))
