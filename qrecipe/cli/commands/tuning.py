"""The commands that write recipes: their arguments, help texts and exit statuses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

import typer

from qrecipe.cli.options import (
    DataOption,
    HtmlOption,
    InputOption,
    JsonOption,
    ModelOption,
    PluginOption,
    RecipeArgument,
    TargetCpuName,
    TargetCpuOption,
    ThreadsOption,
)
from qrecipe.cli.output import FOUND_SOMETHING, needs_torch, reported

OutOption = Annotated[
    str | None,
    typer.Option("--out", metavar="FILE", help="Write the recipe to this file."),
]


def suggest(
    model: ModelOption,
    input: InputOption = None,
    batches: Annotated[
        int | None,
        typer.Option(
            "--batches",
            min=1,
            metavar="N",
            help="Number of calibration batches; few batches call for another observer.",
        ),
    ] = None,
    out: OutOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Suggest a recipe to start from.

    Static for convolutional nets, dynamic if linear and recurrent layers dominate, both for a
    mixture. Rules that leave something float give the reason.

    \b
    Examples:
      qrecipe suggest --model model.py:factory --out cnn.toml
      qrecipe suggest --model torchvision.models:resnet18 --input 1x3x224x224 --batches 8
    """
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli import tune as tuning

        tuning.suggest(
            model, shapes=input, num_batches=batches, out=out, plugins=plugin, as_json=json
        )


def tune(
    recipe: RecipeArgument,
    model: ModelOption,
    data: DataOption,
    evaluate: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:NAME",
            help="A function that takes a model and returns its accuracy; higher is better.",
            show_default=False,
        ),
    ],
    max_drop: Annotated[
        float, typer.Option(min=0, metavar="X", help="How much accuracy may be lost.")
    ] = 0.01,
    max_trials: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Maximum number of trials.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Start no trial after that many seconds.")
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write each trial to this JSON file, and resume from it if it exists.",
        ),
    ] = None,
    out: OutOption = None,
    html: HtmlOption = None,
    target_cpu: TargetCpuOption = TargetCpuName.this,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Search for a recipe within an accuracy budget that leaves little float.

    The exit status is 1 if the budget was not met or the search was interrupted; the best recipe
    is written anyway.

    \b
    Examples:
      qrecipe tune cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --max-drop 0.005 --out tuned.toml
      qrecipe tune cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --log trials.json --max-seconds 600 --html tuning.html
    """
    if max_seconds is not None and not max_seconds > 0:
        raise typer.BadParameter("must be above 0", param_hint="--max-seconds")
    _check_distinct({"--log": log, "--out": out, "--html": html})
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli.tune import tune_recipe

        result = tune_recipe(
            recipe,
            model,
            data,
            evaluate,
            max_drop=max_drop,
            max_trials=max_trials,
            max_seconds=max_seconds,
            log=log,
            out=out,
            html=html,
            target_cpu=target_cpu.value,
            threads=threads,
            plugins=plugin,
            as_json=json,
        )
    if not result.reached or result.stopped == "interrupt":
        raise typer.Exit(FOUND_SOMETHING)


def _check_distinct(outputs: Mapping[str, str | None]) -> None:
    """Raise if two options name the same file: the later would overwrite the earlier."""
    taken: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        real = os.path.realpath(path.replace("\0", ""))
        if real in taken:
            raise typer.BadParameter(f"{taken[real]} already writes this file", param_hint=option)
        taken[real] = option
