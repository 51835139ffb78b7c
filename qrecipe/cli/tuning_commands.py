"""The commands that write recipes: their arguments, help texts and exit statuses."""

from __future__ import annotations

from typing import Annotated

import typer

from qrecipe.cli.options import InputOption, JsonOption, ModelOption, PluginOption
from qrecipe.cli.output import needs_torch, reported

OutOption = Annotated[
    str | None,
    typer.Option("--out", metavar="FILE", help="Write the recipe to this file."),
]


def suggest(
    model: ModelOption,
    input: InputOption = None,
    out: OutOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Suggest a recipe to start from.

    Static for convolutional nets, dynamic where linear and recurrent layers dominate, both where
    both stand; what stays float says why.

    \b
    Examples:
      qrecipe suggest --model model.py:factory --out cnn.toml
      qrecipe suggest --model torchvision.models:resnet18 --input 1x3x224x224
    """
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli import tuning

        tuning.suggest(model, input or (), plugin or (), out, as_json=json)
