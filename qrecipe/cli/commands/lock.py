"""``qrecipe lock`` and ``qrecipe plan --check``: store a plan, compare a plan with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qrecipe.cli.options import (
    InputOption,
    JsonOption,
    ModelOption,
    PluginOption,
    RecipeArgument,
)
from qrecipe.cli.output import needs_torch, out, out_json, reported
from qrecipe.errors.text import counted

if TYPE_CHECKING:
    from qrecipe.planning.plan import Plan

LockOption = Annotated[
    str | None,
    typer.Option(
        "--lock",
        metavar="FILE.lock.toml",
        help="The lock file; default: next to the recipe, or in this folder for a reference.",
    ),
]


def lock(
    recipe: RecipeArgument,
    model: ModelOption,
    input: InputOption = None,
    lock: LockOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Write the lock file of a recipe and a model.

    It has the outcome for every site; `qrecipe plan --check` compares a plan with it. If several
    models share a recipe, name a lock file for each with --lock.

    \b
    Examples:
      qrecipe lock cnn.toml --model model.py:factory
      qrecipe lock cnn.toml --model net.py:factory --lock net.lock.toml
    """
    with reported(as_json=json):
        needs_torch()
        from qrecipe.authoring.lock.file import write_lock
        from qrecipe.cli.plan import make_plan

        path = _path(recipe, lock)
        plan = make_plan(recipe, model, input, plugin)
        write_lock(plan, path)
        if json:
            out_json({"lock": str(path), "sites": len(plan.sites)})
        else:
            out(f"{path}: {counted(len(plan.sites), 'site')} locked")


def check_plan(plan: Plan, recipe: str, lock: str | None, *, as_json: bool) -> None:
    """Compare a plan with its lock file. Raises PlanError if an outcome has changed."""
    from qrecipe.authoring.lock.check import check_lock

    path = _path(recipe, lock)
    found = check_lock(plan, path)
    causes = [cause.to_json() for cause in found.causes]
    if as_json:
        out_json({"lock": str(path), "findings": [], "changed_without_effect": causes})
        return
    out(f"{path}: {counted(len(plan.sites), 'site')} as locked")
    if causes:
        out("changed without effect on the sites (run `qrecipe lock` to update the file):")
        for cause in found.causes:
            out(f"  {cause}")


def _path(recipe: str, lock: str | None) -> Path:
    from qrecipe.authoring.lock.file import lock_path
    from qrecipe.recipe.toml.writer import LOCK_SUFFIX

    if lock is None:
        return lock_path(recipe)
    if not lock.endswith(LOCK_SUFFIX):
        text = f'"{lock}" is not a name for a lock file: it must end in {LOCK_SUFFIX}'
        raise typer.BadParameter(text, param_hint="--lock")
    return Path(lock)
