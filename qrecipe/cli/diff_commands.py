"""``qrecipe diff``: what two recipes set differently, and what that does to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qrecipe.cli.options import InputOption, JsonOption, PluginOption
from qrecipe.cli.output import FOUND_SOMETHING, needs_torch, out, out_json, reported

if TYPE_CHECKING:
    from qrecipe.authoring.outcomes import Change, PlanOutcome
    from qrecipe.authoring.recipe_diff import Value, ValueChange
    from qrecipe.cli.usercode import UserCode
    from qrecipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class _Effect:
    """What two recipes do to one model."""

    before: PlanOutcome
    after: PlanOutcome
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class _Difference:
    """Two recipes, as named on the command line, and how they differ; no effect without a model."""

    names: tuple[str, str]
    recipes: tuple[Recipe, Recipe]
    values: tuple[ValueChange, ...]
    effect: _Effect | None

    @property
    def is_empty(self) -> bool:
        return not self.values and (self.effect is None or not self.effect.changes)


def diff(
    before: Annotated[
        str,
        typer.Argument(metavar="A", help="A recipe: a file or a reference.", show_default=False),
    ],
    after: Annotated[
        str, typer.Argument(metavar="B", help="The one to compare with it.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FILE.py:NAME",
            help="Compare as well what both do to the model that this function gives.",
        ),
    ] = None,
    input: InputOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two recipes by resolved values, and with a model by what becomes of each site.

    Exit status 1 where they differ. Comments, descriptions and reasons are no difference.

    \b
    Examples:
      qrecipe diff cnn.toml builtin:x86-static
      qrecipe diff old.toml new.toml --model model.py:factory
    """
    with reported(as_json=json):
        from qrecipe.authoring.recipe_diff import value_changes
        from qrecipe.cli.usercode import UserCode, user_output
        from qrecipe.recipe import load_recipe

        with UserCode() as code, user_output():
            code.import_plugins(plugin or ())
            recipes = load_recipe(before), load_recipe(after)
            effect = None if model is None else _effect(code, recipes, model, input or ())
        values = tuple(value_changes(*recipes))
        difference = _Difference((before, after), recipes, values, effect)
        (_show_json if json else _show_text)(difference)
    if not difference.is_empty:
        raise typer.Exit(FOUND_SOMETHING)


def _effect(
    code: UserCode, recipes: tuple[Recipe, Recipe], model: str, shapes: Sequence[str]
) -> _Effect:
    needs_torch()
    from qrecipe.authoring.outcomes import outcome_changes, plan_outcome
    from qrecipe.cli.subjects import load_subject, required_inputs
    from qrecipe.pipeline import plan

    subject = load_subject(code, model, shapes)
    inputs = required_inputs(subject, model)
    before, after = (plan_outcome(plan(subject.model, recipe, inputs)) for recipe in recipes)
    return _Effect(before, after, tuple(outcome_changes(before, after)))


def _show_text(difference: _Difference) -> None:
    from qrecipe.tables import render_table

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


def _summary(difference: _Difference) -> str:
    count = len(difference.values)
    values = {0: "no value differs", 1: "1 value differs"}.get(count, f"{count} values differ")
    if not count:
        values += f" (fingerprint {difference.recipes[0].fingerprint})"
    if difference.effect is None:
        return values
    subjects = {change.subject for change in difference.effect.changes}
    sites = {**difference.effect.before.sites, **difference.effect.after.sites}
    changed = len(subjects & sites.keys())
    return f"{values}; {changed} of {len(sites)} sites become something else"


def _cells(value: Value | None) -> tuple[str, str]:
    if value is None:
        return "(not set)", ""
    return value.text, str(value.location or "")


def _deciders(effect: _Effect, change: Change) -> tuple[str, str]:
    before, after = (
        outcome.sites[change.subject].by if change.subject in outcome.sites else ""
        for outcome in (effect.before, effect.after)
    )
    return before, after


def _show_json(difference: _Difference) -> None:
    a, b = (
        {"recipe": name, "fingerprint": recipe.fingerprint}
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


def _value_json(value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    at = value.location
    return {"value": value.text, "location": None if at is None else str(at)}


def _site_json(effect: _Effect, change: Change) -> dict[str, Any]:
    before, after = _deciders(effect, change)
    return {
        "site": change.subject,
        "part": change.part,
        "a": change.before,
        "b": change.after,
        "a_decided_by": before or None,
        "b_decided_by": after or None,
    }
