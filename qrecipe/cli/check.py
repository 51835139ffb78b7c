"""``qrecipe check``: all findings of all files, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from qrecipe.cli.output import out, out_json
from qrecipe.errors.findings import Finding, QRecipeError, in_full
from qrecipe.errors.text import counted
from qrecipe.recipe.recipe import Ingredient, load_recipe, published
from qrecipe.recipe.toml.writer import LOCK_SUFFIX


@dataclass(frozen=True, slots=True)
class Checked:
    """The findings in a recipe, and its files as far as they could be read."""

    findings: tuple[Finding, ...]
    ingredients: tuple[Ingredient, ...] = ()


CheckedRecipes = Mapping[str, Checked]
"""By recipe, as named on the command line."""


def check(recipes: Sequence[str]) -> CheckedRecipes:
    """Load each recipe, a path or a reference; lock files are skipped."""
    return {recipe: _checked(recipe) for recipe in recipes if not recipe.endswith(LOCK_SUFFIX)}


def fails(found: CheckedRecipes, *, strict: bool) -> bool:
    """Whether any finding is an error; with ``strict`` warnings are errors too."""
    return any(strict or finding.severity == "error" for finding in _findings(found))


def show_text(found: CheckedRecipes) -> None:
    """Each finding once, even if several recipes extend the file at fault; then a summary."""
    distinct: dict[object, Finding] = {}
    for finding in _findings(found):
        distinct.setdefault((finding.code, finding.message, finding.location), finding)
    for text in in_full([*distinct.values()]):
        out(f"{text}\n")
    for recipe, checked in found.items():
        for line in published(checked.ingredients):
            out(f"{recipe} {line}")
    errors = sum(finding.severity == "error" for finding in distinct.values())
    warnings = len(distinct) - errors
    counts = [_count(errors, "error"), *([_count(warnings, "warning")] if warnings else [])]
    out(f"{counted(len(found), 'recipe')} checked: {', '.join(counts)}")


def _count(number: int, what: str) -> str:
    return {0: f"no {what}s", 1: f"1 {what}"}.get(number, f"{number} {what}s")


def show_json(found: CheckedRecipes) -> None:
    """The recipes and all findings, each with its recipe."""
    out_json(
        {
            "recipes": [
                {"recipe": recipe, "ingredients": [each.to_json() for each in checked.ingredients]}
                for recipe, checked in found.items()
            ],
            "findings": [
                {"recipe": recipe, **finding.to_json()}
                for recipe, checked in found.items()
                for finding in checked.findings
            ],
        }
    )


def _checked(name: str) -> Checked:
    try:
        recipe = load_recipe(name)
    except QRecipeError as error:
        return Checked(error.findings)
    return Checked(recipe.warnings, recipe.ingredients)


def _findings(found: CheckedRecipes) -> list[Finding]:
    return list(chain.from_iterable(checked.findings for checked in found.values()))
