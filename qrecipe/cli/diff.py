"""``qrecipe diff``: load two recipes, compare them, show the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import FOUND_SOMETHING, out, out_json
from qrecipe.cli.user_code import UserCode, user_code, user_output
from qrecipe.terminal.tables import render_table

if TYPE_CHECKING:
    from qrecipe.authoring.diff import Value
    from qrecipe.authoring.lock.file import Lock
    from qrecipe.recipe.recipe import Recipe


def diff(
    before: Annotated[str, options.argument("A", "A recipe: a file or a reference.")],
    after: Annotated[str, options.argument("B", "The recipe to compare it with.")],
    model: Annotated[
        str | None,
        options.function(
            "--model", "Also compare their effect on the model that this function returns."
        ),
    ] = None,
    input: options.Input = None,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Compare two recipes by their values and their effect.

    Shows the values that differ after merging bases and, with a model, the sites that differ, and
    what transforms change. The exit status is 1 if anything differs. Comments, descriptions and
    reasons don't count.

    \b
    Examples:
      qrecipe diff cnn.toml builtin:x86-static
      qrecipe diff old.toml new.toml --model model.py:factory
    """
    names = (before, after)
    from qrecipe.authoring.diff import value_changes

    with user_code(plugin) as code, user_output():
        recipes = qrecipe.load_recipe(before), qrecipe.load_recipe(after)
        values = [
            {"key": each.key, "a": _value(each.before), "b": _value(each.after)}
            for each in value_changes(*recipes)
        ]
        sites, every = (None, set()) if model is None else _sites(code, recipes, model, input)
    if json:
        a, b = map(_identity, names, recipes)
        out_json({"a": a, "b": b, "values": values, "sites": sites})
    else:
        _show(names, recipes, values, sites, every)
    if values or sites:
        raise typer.Exit(FOUND_SOMETHING)


_Rows = Sequence[Mapping[str, Any]]
"""Differences as in the JSON document."""


def _sites(
    code: UserCode, recipes: tuple[Recipe, Recipe], model: str, shapes: Sequence[str] | None
) -> tuple[_Rows, Set[str]]:
    """How the outcomes for the plan and its sites differ, and the names of all sites."""
    from qrecipe.authoring.lock.check import outcome_changes
    from qrecipe.authoring.lock.file import make_lock
    from qrecipe.cli.model_argument import load_subject, required_inputs

    subject = load_subject(code, model, shapes)
    inputs = required_inputs(subject, model)
    before, after = (
        make_lock(qrecipe.plan(subject.model, each, inputs), Path()) for each in recipes
    )
    changes = [
        {
            "site": change.subject,
            "part": change.part,
            "a": change.before,
            "b": change.after,
            "a_decided_by": _decider(before, change.subject),
            "b_decided_by": _decider(after, change.subject),
        }
        for change in outcome_changes(before, after)
    ]
    return changes, before.sites.keys() | after.sites.keys()


def _decider(lock: Lock, site: str) -> str | None:
    outcome = lock.sites.get(site)
    return None if outcome is None else outcome.by


def _show(
    names: Sequence[str],
    recipes: Sequence[Recipe],
    values: _Rows,
    sites: _Rows | None,
    every: Set[str],
) -> None:
    """A table of values, a table of sites, and a summary."""
    from qrecipe.recipe.recipe import published

    a, b = names
    if values:
        rows = [(each["key"], *_cells(each["a"]), *_cells(each["b"])) for each in values]
        out(render_table(("value", a, "set at", b, "set at"), rows) + "\n")
    if sites:
        head = ("site", "", a, b, "decided by", "decided by")
        lines = [
            (
                each["site"],
                each["part"],
                each["a"] or "-",
                each["b"] or "-",
                each["a_decided_by"] or "",
                each["b_decided_by"] or "",
            )
            for each in sites
        ]
        out(render_table(head, lines) + "\n")
    if not values:
        summary = f"no value differs (fingerprint {recipes[0].fingerprint})"
    else:
        summary = "1 value differs" if len(values) == 1 else f"{len(values)} values differ"
    if sites is not None:
        changed = every & {each["site"] for each in sites}
        summary += f"; {len(changed)} of {len(every)} sites differ"
    out(summary)
    for name, recipe in zip(names, recipes, strict=True):
        for line in published(recipe.ingredients):
            out(f"{name} {line}")


def _identity(name: str, recipe: Recipe) -> dict[str, Any]:
    ingredients = [each.to_json() for each in recipe.ingredients]
    return {"recipe": name, "fingerprint": recipe.fingerprint, "ingredients": ingredients}


def _value(value: Value | None) -> dict[str, str | None] | None:
    if value is None:
        return None
    at = value.location
    return {"value": value.text, "location": None if at is None else str(at)}


def _cells(value: Mapping[str, str | None] | None) -> tuple[str, str]:
    if value is None:
        return "(not set)", ""
    return value["value"] or "", value["location"] or ""
