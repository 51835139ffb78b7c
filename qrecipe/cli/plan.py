"""``qrecipe plan``, ``explain`` and ``lock``: what a recipe makes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import check_free, fail_on, out, out_json
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.errors.findings import PlanError
from qrecipe.errors.text import counted
from qrecipe.recipe.toml.writer import LOCK_SUFFIX

if TYPE_CHECKING:
    from qrecipe.planning.plan import Plan
    from qrecipe.recipe.schema import Executor

LockOption = Annotated[
    str | None,
    typer.Option(
        "--lock",
        metavar="FILE.lock.toml",
        help="The lock file; default: next to the recipe, or in this folder for a reference.",
    ),
]


def plan(
    recipe: options.Recipe,
    model: options.Model,
    input: options.Input = None,
    executor: options.Executor = None,
    check: Annotated[
        bool, options.flag("--check", "Fail if the plan differs from the lock file.")
    ] = False,
    lock: LockOption = None,
    all_rules: Annotated[
        bool, options.flag("--all-rules", "Also list the rules of shipped recipes that are unused.")
    ] = False,
    strict: options.Strict = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Show what will happen to each operation of a model.

    \b
    Examples:
      qrecipe plan cnn.toml --model model.py:factory
      qrecipe plan cnn.toml --model model.py:factory --check
      qrecipe plan builtin:x86-static --model torchvision.models:resnet18 --input 1x3x224x224
    """
    if lock is not None and not check:
        raise typer.BadParameter("only goes with --check", param_hint="--lock")
    made = _make_plan(recipe, model, input, plugin, executor)
    if check:
        _check_lock(made, _lock_path(recipe, lock), as_json=json)
    elif json:
        out(made.to_json())
    else:
        shown = replace(made, warnings=()) if strict else made  # `fail_on` shows them
        out(shown.with_all_rules() if all_rules else str(shown))
    if strict:
        fail_on(made.warnings)


def explain(
    recipe: options.Recipe,
    name: Annotated[
        str,
        options.argument("NAME", "A site, a member of a site, or a module, as named in the plan."),
    ],
    model: options.Model,
    input: options.Input = None,
    executor: options.Executor = None,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Explain what decided an operation or a module.

    \b
    Examples:
      qrecipe explain cnn.toml layer1.0.bn1 --model model.py:factory
      qrecipe explain cnn.toml layer1.0:add --model model.py:factory
    """
    try:
        made = _make_plan(recipe, model, input, plugin, executor)
    except PlanError as error:
        if error.plan is None:
            raise
        made = error.plan
    if json:
        from qrecipe.planning.text import explanation_json

        out_json(explanation_json(made, name))
    else:
        out(made.explain(name))
    fail_on(made.findings)


def lock(
    recipe: options.Recipe,
    model: options.Model,
    input: options.Input = None,
    executor: options.Executor = None,
    lock: LockOption = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Write the lock file of a recipe and a model.

    It has the outcome for every site; `qrecipe plan --check` compares a plan with it. If several
    models share a recipe, name a lock file for each with --lock. An older lock file is replaced.

    \b
    Examples:
      qrecipe lock cnn.toml --model model.py:factory
      qrecipe lock cnn.toml --model net.py:factory --lock net.lock.toml
    """
    from qrecipe.authoring.lock.file import is_lock, write_lock

    path = _lock_path(recipe, lock)
    if not is_lock(path):
        check_free({"--lock": str(path)}, force=force)
    made = _make_plan(recipe, model, input, plugin, executor)
    write_lock(made, path)
    if json:
        out_json({"lock": str(path), "sites": len(made.sites)})
    else:
        out(f"{path}: {counted(len(made.sites), 'site')} locked")


def _make_plan(
    recipe: str,
    model: str,
    shapes: Sequence[str] | None,
    plugins: Sequence[str] | None,
    executor: Executor | None,
) -> Plan:
    """The plan of a recipe for the model of a factory, named as on the command line."""
    from qrecipe.cli.model_argument import load_subject, required_inputs
    from qrecipe.model.call import Inputs
    from qrecipe.planning.asked import executed_by
    from qrecipe.planning.decide import decide

    with user_code(plugins) as code, user_output():
        loaded = executed_by(qrecipe.load_recipe(recipe), executor)
        subject = load_subject(code, model, shapes)
        inputs = Inputs.from_batch(required_inputs(subject, model))
        return decide(subject.model, loaded, inputs)


def _check_lock(plan: Plan, path: Path, *, as_json: bool) -> None:
    """Compare a plan with its lock file. Raises PlanError if an outcome has changed."""
    from qrecipe.authoring.lock.check import check_lock

    causes = check_lock(plan, path).causes
    if as_json:
        changed = [cause.to_json() for cause in causes]
        out_json({"lock": str(path), "findings": [], "changed_without_effect": changed})
        return
    out(f"{path}: {counted(len(plan.sites), 'site')} as locked")
    if causes:
        out("changed without effect on the sites (run `qrecipe lock` to update the file):")
        for cause in causes:
            out(f"  {cause}")


def _lock_path(recipe: str, lock: str | None) -> Path:
    from qrecipe.authoring.lock.file import lock_path

    if lock is None:
        return lock_path(recipe)
    if not lock.endswith(LOCK_SUFFIX):
        text = f'"{lock}" is not a name for a lock file: it must end in {LOCK_SUFFIX}'
        raise typer.BadParameter(text, param_hint="--lock")
    return Path(lock)
