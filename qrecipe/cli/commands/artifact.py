"""The commands about stored models."""

from __future__ import annotations

from typing import Annotated

import typer

from qrecipe.cli.options import JsonOption
from qrecipe.cli.output import reported


def inspect(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A file from save_quantized.", show_default=False),
    ],
    json: JsonOption = False,
) -> None:
    """Show the recipe, plan and versions of a stored model, without torch.

    \b
    Examples:
      qrecipe inspect model.safetensors
      qrecipe inspect model.safetensors --json
    """
    with reported(as_json=json):
        from qrecipe.cli import inspect as inspecting

        found = inspecting.inspect(file)
        (inspecting.show_json if json else inspecting.show_text)(found)
