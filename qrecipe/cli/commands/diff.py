"""``qrecipe diff``: its arguments, help and exit status."""

from __future__ import annotations

from typing import Annotated

import typer

from qrecipe.cli.options import InputOption, JsonOption, PluginOption
from qrecipe.cli.output import FOUND_SOMETHING, reported


def diff(
    before: Annotated[
        str,
        typer.Argument(metavar="A", help="A recipe: a file or a reference.", show_default=False),
    ],
    after: Annotated[
        str, typer.Argument(metavar="B", help="The recipe to compare it with.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FILE.py:NAME",
            help="Also compare their effect on the model that this function returns.",
        ),
    ] = None,
    input: InputOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two recipes by their values and their effect.

    Shows the values that differ after merging bases and, with a model, the sites that differ. The
    exit status is 1 if anything differs. Comments, descriptions and reasons don't count.

    \b
    Examples:
      qrecipe diff cnn.toml builtin:x86-static
      qrecipe diff old.toml new.toml --model model.py:factory
    """
    with reported(as_json=json):
        from qrecipe.cli import diff as diffing

        found = diffing.compare((before, after), model, input, plugin)
        (diffing.show_json if json else diffing.show_text)(found)
    if not found.is_empty:
        raise typer.Exit(FOUND_SOMETHING)
