"""``qrecipe check``: all findings of all files, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import FOUND_SOMETHING, out, out_json
from qrecipe.cli.user_code import user_code
from qrecipe.errors.findings import Finding, QRecipeError, RecipeError, in_full
from qrecipe.errors.text import counted
from qrecipe.recipe.toml.document import parse_document, read_text
from qrecipe.recipe.toml.writer import LOCK_SUFFIX

if TYPE_CHECKING:
    from qrecipe.recipe.recipe import Ingredient


Ingredients = Mapping[str, Sequence["Ingredient"]]
"""By recipe, as named on the command line; those of a recipe that cannot be read are unknown."""


def check(
    files: Annotated[
        list[str], options.argument("FILE", "Recipes: files, references, or folders of them.")
    ],
    strict: options.Strict = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Check recipes without torch, for pre-commit and CI.

    In a folder, all recipes in it and below are checked; other TOML files and lock files
    (*.lock.toml) are skipped.

    \b
    Examples:
      qrecipe check recipes
      qrecipe check --plugin acme.observers cnn.toml builtin:x86-static
    """
    found: list[tuple[str, Finding]] = []
    ingredients: dict[str, Sequence[Ingredient]] = {}
    with user_code(plugin):
        for name in dict.fromkeys(each for file in files for each in _named(file)):
            findings, ingredients[name] = _checked(name)
            found += [(name, finding) for finding in findings]
        found = _without_parts(found, ingredients, files)
        (_show_json if json else _show_text)(found, ingredients)
    if any(strict or finding.severity == "error" for _, finding in found):
        raise typer.Exit(FOUND_SOMETHING)


def _named(file: str) -> list[str]:
    """A recipe, or those in a folder; no lock file."""
    if not os.path.isdir(file):
        return [] if file.endswith(LOCK_SUFFIX) else [file]
    recipes = list(recipes_in(Path(file)))
    if not recipes:
        raise typer.BadParameter(f"{file}: there is no recipe in this folder", param_hint="FILE")
    return recipes


def _without_parts(
    found: Sequence[tuple[str, Finding]], ingredients: Ingredients, named: Sequence[str]
) -> list[tuple[str, Finding]]:
    """The findings without what files of folders lack that others extend: these are parts."""
    bases = {os.path.realpath(each.name) for its in ingredients.values() for each in its[1:]}
    return [
        (name, finding)
        for name, finding in found
        if finding.code != "QR103" or name in named or os.path.realpath(name) not in bases
    ]


def _checked(name: str) -> tuple[Sequence[Finding], Sequence[Ingredient]]:
    try:
        recipe = qrecipe.load_recipe(name)
    except QRecipeError as error:
        return error.findings, ()
    return recipe.warnings, recipe.ingredients


def _show_text(found: Sequence[tuple[str, Finding]], ingredients: Ingredients) -> None:
    """Each finding once, even if several recipes extend the file at fault; then a summary."""
    from qrecipe.recipe.recipe import published

    distinct: dict[object, Finding] = {}
    for _, finding in found:
        distinct.setdefault((finding.code, finding.message, finding.location), finding)
    for text in in_full([*distinct.values()]):
        out(f"{text}\n")
    for recipe, its in ingredients.items():
        for line in published(its):
            out(f"{recipe} {line}")
    errors = sum(finding.severity == "error" for finding in distinct.values())
    warnings = len(distinct) - errors
    counts = [counted(errors, "error") if errors else "no errors"]
    counts += [counted(warnings, "warning")] if warnings else []
    out(f"{counted(len(ingredients), 'recipe')} checked: {', '.join(counts)}")


def _show_json(found: Sequence[tuple[str, Finding]], ingredients: Ingredients) -> None:
    out_json(
        {
            "recipes": [
                {"recipe": recipe, "ingredients": [each.to_json() for each in its]}
                for recipe, its in ingredients.items()
            ],
            "findings": [{"recipe": recipe, **finding.to_json()} for recipe, finding in found],
        }
    )


_TABLES = ("tensor", "qconfig", "rules")


def recipes_in(folder: Path) -> Iterator[str]:
    """The recipes in a folder and those below it, in order.

    Hidden folders and virtual environments are left out. A file that is not valid TOML counts as
    a recipe, because it could be one.
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
