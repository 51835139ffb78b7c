"""``qrecipe check``: all findings of all files, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from qrecipe.cli.output import out, out_json
from qrecipe.errors import Finding, QRecipeError
from qrecipe.recipe import load_recipe

Findings = Mapping[str, Sequence[Finding]]
"""What was found, by recipe as named on the command line."""


def check(recipes: Sequence[str]) -> Findings:
    """Load each recipe, a path or a reference."""
    return {recipe: _findings(recipe) for recipe in recipes}


def has_errors(found: Findings) -> bool:
    """Whether any finding is more than a warning."""
    return any(finding.severity == "error" for finding in chain.from_iterable(found.values()))


def show_text(found: Findings) -> None:
    """Each finding once, though several recipes extend what is at fault; then a summary."""
    distinct: dict[object, Finding] = {}
    for finding in chain.from_iterable(found.values()):
        distinct.setdefault((finding.code, finding.message, finding.location), finding)
    for finding in distinct.values():
        out(f"{finding}\n")
    recipes = "1 recipe" if len(found) == 1 else f"{len(found)} recipes"
    count = sum(finding.severity == "error" for finding in distinct.values())
    errors = {0: "no errors", 1: "1 error"}.get(count, f"{count} errors")
    out(f"{recipes} checked: {errors}")


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
        load_recipe(recipe)
    except QRecipeError as error:
        return error.findings
    return ()
