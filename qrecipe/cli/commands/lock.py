"""``qrecipe lock`` and ``qrecipe plan --check``: keep a plan in a file, hold a plan against it."""

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
        help="The lock file; default: beside the recipe, or for a reference in this folder.",
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

    It holds the outcome of every site, for `qrecipe plan --check` to compare. A recipe that several
    models share has a lock file for each: name them with --lock.

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
    """Hold a plan against its lock file. Raises PlanError where an outcome has changed."""
    from qrecipe.authoring.lock.check import check_lock

    path = _path(recipe, lock)
    found = check_lock(plan, path)
    causes = [cause.to_json() for cause in found.causes]
    if as_json:
        out_json({"lock": str(path), "findings": [], "changed_without_effect": causes})
        return
    out(f"{path}: {counted(len(plan.sites), 'site')} as locked")
    if causes:
        out("changed without effect on them (`qrecipe lock` brings the file up to date):")
        for cause in found.causes:
            out(f"  {cause}")


def _path(recipe: str, lock: str | None) -> Path:
    from qrecipe.authoring.lock.file import lock_path
    from qrecipe.recipe.toml.writer import LOCK_SUFFIX

    if lock is None:
        return lock_path(recipe)
    if not lock.endswith(LOCK_SUFFIX):
        text = f'"{lock}" is no name of a lock file: it ends in {LOCK_SUFFIX}'
        raise typer.BadParameter(text, param_hint="--lock")
    return Path(lock)
