"""``qrecipe check``: all findings of all files, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from qrecipe.cli.output import out, out_json
from qrecipe.errors import Finding, QRecipeError
from qrecipe.recipe import load_recipe
from qrecipe.writing import LOCK_SUFFIX

Findings = Mapping[str, Sequence[Finding]]
"""What was found, by recipe as named on the command line."""


def check(recipes: Sequence[str]) -> Findings:
    """Load each recipe, a path or a reference; lock files, which lie beside them, are none."""
    return {recipe: _findings(recipe) for recipe in recipes if not recipe.endswith(LOCK_SUFFIX)}


def fails(found: Findings, *, strict: bool) -> bool:
    """Whether any finding is an error; with ``strict`` warnings are errors too."""
    every = chain.from_iterable(found.values())
    return any(strict or finding.severity == "error" for finding in every)


def show_text(found: Findings) -> None:
    """Each finding once, though several recipes extend what is at fault; then a summary."""
    distinct: dict[object, Finding] = {}
    for finding in chain.from_iterable(found.values()):
        distinct.setdefault((finding.code, finding.message, finding.location), finding)
    for finding in distinct.values():
        out(f"{finding}\n")
    recipes = "1 recipe" if len(found) == 1 else f"{len(found)} recipes"
    errors = sum(finding.severity == "error" for finding in distinct.values())
    warnings = len(distinct) - errors
    counted = [_count(errors, "error"), *([_count(warnings, "warning")] if warnings else [])]
    out(f"{recipes} checked: {', '.join(counted)}")


def _count(number: int, what: str) -> str:
    return {0: f"no {what}s", 1: f"1 {what}"}.get(number, f"{number} {what}s")


def show_json(found: Findings) -> None:
    """A list of findings, each with the recipe in which it was found."""
    out_json(
        [
            {"recipe": recipe, **finding.to_json()}
            for recipe, findings in found.items()
            for finding in findings
        ]
    )


def _findings(recipe: str) -> tuple[Finding, ...]:
    try:
        return load_recipe(recipe).warnings
    except QRecipeError as error:
        return error.findings
