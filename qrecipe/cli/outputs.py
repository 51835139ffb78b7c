"""The files that a command writes, checked before it works for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import typer

import qrecipe
from qrecipe.files import check_replaceable_file, why_not


def check_outputs(
    outputs: Mapping[str, str | None],
    reads: Iterable[str] = (),
    *,
    force: bool,
    log: str | None = None,
) -> None:
    """`check_distinct`, then `check_free`; a ``log`` may exist."""
    check_distinct({"--log": log, **outputs}, reads)
    check_free(outputs, force=force)
    check_free({"--log": log}, force=True)


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


def check_free(outputs: Mapping[str, str | None], *, force: bool) -> None:
    """Raise BadParameter if a file cannot be written, or exists and is to be kept.

    A file that exists is only replaced with ``force``, unless it is empty.
    """
    for option, path in outputs.items():
        problem = None if path is None else _problem(path, force=force)
        if problem is not None:
            raise typer.BadParameter(f"{path}: {problem}", param_hint=option)


def files_of(recipe: str) -> list[str]:
    """The files that a recipe is made of; names of recipes that are in no file are among them.

    Raises what `qrecipe.load_recipe` raises.
    """
    return [each.name for each in qrecipe.load_recipe(recipe).ingredients]


def _problem(path: str, *, force: bool) -> str | None:
    try:
        check_replaceable_file(Path(path))
        is_in_the_way = os.path.lexists(path) and os.path.getsize(path) > 0
    except (OSError, ValueError) as error:
        return f"{why_not(error)}: name a file in an existing folder"
    if is_in_the_way and not force:
        return "it exists: name another file, or pass --force"
    return None


def _real(path: str) -> str:
    return os.path.realpath(path.replace("\0", ""))
