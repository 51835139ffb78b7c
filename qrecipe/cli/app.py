"""The commands: their arguments, help texts and exit statuses.

The modules that do the work are imported inside each command, to keep the start fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qrecipe._version import __version__
from qrecipe.cli.commands.artifact import inspect
from qrecipe.cli.commands.diff import diff
from qrecipe.cli.commands.drift import drift
from qrecipe.cli.commands.lock import LockOption, check_plan, lock
from qrecipe.cli.commands.measuring import compare, sensitivity
from qrecipe.cli.commands.tuning import suggest, tune
from qrecipe.cli.options import (
    InputOption,
    JsonOption,
    ModelOption,
    PluginOption,
    RecipeArgument,
    StrictOption,
    TargetCpuName,
    TargetCpuOption,
    ThreadsOption,
)
from qrecipe.cli.output import FOUND_SOMETHING, fail_on, needs_torch, out, out_json, reported

app = typer.Typer(
    name="qrecipe",
    help="Quantize PyTorch models by recipes: planned before they run, verified afterwards.",
    epilog="Exit status: 0 success, 1 something was found, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out(f"qrecipe {__version__}")
        raise typer.Exit


@app.callback()
def qrecipe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Recipes: files or references.", show_default=False),
    ],
    strict: StrictOption = False,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Check recipes without torch, for pre-commit and CI.

    Lock files (*.lock.toml) are skipped.

    \b
    Examples:
      qrecipe check recipes/*.toml
      qrecipe check --plugin acme.observers cnn.toml builtin:x86-static
    """
    with reported(as_json=json):
        _import_plugins(plugin)
        from qrecipe.cli import check as checking

        found = checking.check(files)
        (checking.show_json if json else checking.show_text)(found)
    if checking.fails(found, strict=strict):
        raise typer.Exit(FOUND_SOMETHING)


@app.command()
def show(recipe: RecipeArgument, plugin: PluginOption = None, json: JsonOption = False) -> None:
    """Show the resolved recipe, and where each value was set.

    \b
    Examples:
      qrecipe show cnn.toml
      qrecipe show builtin:x86-static --json
    """
    with reported(as_json=json):
        _import_plugins(plugin)
        from qrecipe.cli import show as showing
        from qrecipe.recipe.recipe import load_recipe

        (showing.show_json if json else showing.show_text)(load_recipe(recipe))


@app.command()
def plan(
    recipe: RecipeArgument,
    model: ModelOption,
    input: InputOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if the plan differs from the lock file.")
    ] = False,
    lock: LockOption = None,
    strict: StrictOption = False,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Show what will happen to each operation of a model.

    \b
    Examples:
      qrecipe plan cnn.toml --model model.py:factory
      qrecipe plan cnn.toml --model model.py:factory --check
      qrecipe plan builtin:x86-static --model torchvision.models:resnet18 --input 1x3x224x224
    """
    with reported(as_json=json, strict=strict):
        needs_torch()
        from qrecipe.cli.plan import make_plan

        if lock is not None and not check:
            raise typer.BadParameter("only goes with --check", param_hint="--lock")
        made = make_plan(recipe, model, input, plugin)
        if check:
            check_plan(made, recipe, lock, as_json=json)
        else:
            out(made.to_json() if json else str(made))
        if strict:
            fail_on(made.warnings)


@app.command()
def explain(
    recipe: RecipeArgument,
    name: Annotated[
        str,
        typer.Argument(
            help="A site, a member of a site, or a module, as named in the plan.",
            show_default=False,
        ),
    ],
    model: ModelOption,
    input: InputOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Explain what decided an operation or a module.

    \b
    Examples:
      qrecipe explain cnn.toml layer1.0.bn1 --model model.py:factory
      qrecipe explain cnn.toml layer1.0:add --model model.py:factory
    """
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli.plan import make_plan
        from qrecipe.planning.text import explanation_json

        plan = make_plan(recipe, model, input, plugin)
        if json:
            out_json(explanation_json(plan, name))
        else:
            out(plan.explain(name))


@app.command()
def quantize(
    recipe: RecipeArgument,
    model: ModelOption,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="A function that returns an iterable of calibration batches.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME", help="A function that takes a model and returns its accuracy."
        ),
    ] = None,
    input: InputOption = None,
    output: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Save the quantized model as safetensors."),
    ] = None,
    target_cpu: TargetCpuOption = TargetCpuName.this,
    threads: ThreadsOption = None,
    strict: StrictOption = False,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Quantize a model and compare it with the float one.

    Shows the plan, then accuracy, size, latency and the SQNR of the output.

    \b
    Examples:
      qrecipe quantize builtin:x86-static --model model.py:factory --data model.py:batches
      qrecipe quantize cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --threads 1 --out model.safetensors
    """
    with reported(as_json=json, strict=strict):
        needs_torch()
        from qrecipe.cli import quantize as quantizing

        quantizing.quantize(
            recipe,
            model,
            data=data,
            evaluate=evaluate,
            shapes=input,
            output=output,
            target_cpu=target_cpu.value,
            threads=threads,
            plugins=plugin,
            as_json=json,
            strict=strict,
        )


app.command()(inspect)


@app.command("list")
def list_names(plugin: PluginOption = None, json: JsonOption = False) -> None:
    """List recipes, observers, fake-quants and backends.

    Imports all installed plugins to show their arguments, or what is wrong with them.

    \b
    Examples:
      qrecipe list
      qrecipe list --plugin acme.observers --json
    """
    with reported(as_json=json):
        from qrecipe.cli import listing

        (listing.show_json if json else listing.show_text)(listing.take_listing(plugin))


for command in (compare, sensitivity, suggest, tune, diff, drift, lock):
    app.command()(command)


@app.command()
def schema(plugin: PluginOption = None) -> None:
    """Print the recipe format as JSON Schema.

    It includes the names and arguments of all known observers and fake-quants.

    \b
    Examples:
      qrecipe schema > recipe.schema.json
      qrecipe schema --plugin acme.observers > recipe.schema.json
    """
    with reported(as_json=False):
        _import_plugins(plugin)
        from qrecipe.recipe.json_schema import recipe_schema

        out_json(recipe_schema())


def _import_plugins(modules: list[str] | None) -> None:
    from qrecipe.cli.user_code import user_code

    with user_code(modules):
        pass
