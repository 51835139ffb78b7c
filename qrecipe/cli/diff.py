"""``qrecipe diff``: load two recipes, compare them, show the differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrecipe.authoring.diff import Value, ValueChange, value_changes
from qrecipe.cli.output import needs_torch, out, out_json
from qrecipe.cli.user_code import UserCode, user_code, user_output
from qrecipe.recipe.recipe import Recipe, load_recipe, published
from qrecipe.terminal.tables import render_table

if TYPE_CHECKING:
    from qrecipe.authoring.lock.check import Change
    from qrecipe.authoring.lock.file import Lock


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of two recipes on one model."""

    before: Lock
    after: Lock
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Two recipes, as named on the command line, and how they differ; no effect without a model."""

    names: tuple[str, str]
    recipes: tuple[Recipe, Recipe]
    values: tuple[ValueChange, ...]
    effect: Effect | None

    @property
    def is_empty(self) -> bool:
        return not self.values and (self.effect is None or not self.effect.changes)


def compare(
    names: tuple[str, str],
    model: str | None,
    shapes: Sequence[str] | None,
    plugins: Sequence[str] | None,
) -> Difference:
    """Compare two recipes, and their effect on the model of a factory if one is named."""
    with user_code(plugins) as code, user_output():
        recipes = load_recipe(names[0]), load_recipe(names[1])
        effect = None if model is None else _effect(code, recipes, model, shapes)
    return Difference(names, recipes, tuple(value_changes(*recipes)), effect)


def show_text(difference: Difference) -> None:
    """A table of values, a table of sites, and a summary."""
    a, b = difference.names
    if difference.values:
        rows = [(each.key, *_cells(each.before), *_cells(each.after)) for each in difference.values]
        out(render_table(("value", a, "set at", b, "set at"), rows) + "\n")
    effect = difference.effect
    if effect is not None and effect.changes:
        lines = [
            (
                each.subject,
                each.part,
                each.before or "-",
                each.after or "-",
                *_deciders(effect, each),
            )
            for each in effect.changes
        ]
        head = ("site", "", a, b, "decided by", "decided by")
        out(render_table(head, lines) + "\n")
    out(_summary(difference))
    for name, recipe in zip(difference.names, difference.recipes, strict=True):
        for line in published(recipe.ingredients):
            out(f"{name} {line}")


def show_json(difference: Difference) -> None:
    """The same as one document."""
    a, b = (
        {
            "recipe": name,
            "fingerprint": recipe.fingerprint,
            "ingredients": [each.to_json() for each in recipe.ingredients],
        }
        for name, recipe in zip(difference.names, difference.recipes, strict=True)
    )
    effect = difference.effect
    out_json(
        {
            "a": a,
            "b": b,
            "values": [
                {"key": each.key, "a": _value_json(each.before), "b": _value_json(each.after)}
                for each in difference.values
            ],
            "sites": None if effect is None else [_site_json(effect, c) for c in effect.changes],
        }
    )


def _effect(
    code: UserCode, recipes: tuple[Recipe, Recipe], model: str, shapes: Sequence[str] | None
) -> Effect:
    needs_torch()
    from qrecipe.authoring.lock.check import outcome_changes
    from qrecipe.authoring.lock.file import make_lock
    from qrecipe.cli.model_argument import load_subject, required_inputs
    from qrecipe.pipeline import plan

    subject = load_subject(code, model, shapes)
    inputs = required_inputs(subject, model)
    plans = [plan(subject.model, recipe, inputs) for recipe in recipes]
    before, after = (make_lock(each, Path()) for each in plans)
    return Effect(before, after, tuple(outcome_changes(before, after)))


def _summary(difference: Difference) -> str:
    count = len(difference.values)
    values = {0: "no value differs", 1: "1 value differs"}.get(count, f"{count} values differ")
    if not count:
        values += f" (fingerprint {difference.recipes[0].fingerprint})"
    if difference.effect is None:
        return values
    subjects = {change.subject for change in difference.effect.changes}
    sites = {**difference.effect.before.sites, **difference.effect.after.sites}
    changed = len(subjects & sites.keys())
    return f"{values}; {changed} of {len(sites)} sites differ"


def _cells(value: Value | None) -> tuple[str, str]:
    if value is None:
        return "(not set)", ""
    return value.text, str(value.location or "")


def _deciders(effect: Effect, change: Change) -> tuple[str, str]:
    before, after = (
        outcome.sites[change.subject].by if change.subject in outcome.sites else ""
        for outcome in (effect.before, effect.after)
    )
    return before, after


def _value_json(value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    at = value.location
    return {"value": value.text, "location": None if at is None else str(at)}


def _site_json(effect: Effect, change: Change) -> dict[str, Any]:
    before, after = _deciders(effect, change)
    return {
        "site": change.subject,
        "part": change.part,
        "a": change.before,
        "b": change.after,
        "a_decided_by": before or None,
        "b_decided_by": after or None,
    }
