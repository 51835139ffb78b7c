"""``qrecipe help COMMAND``: the help of a command."""

from __future__ import annotations

from typing import Annotated

import typer

from qrecipe.cli.output import out
from qrecipe.errors.spelling import nearest


def help_of(
    ctx: typer.Context,
    command: Annotated[
        str | None, typer.Argument(metavar="COMMAND", help="Default: all commands.")
    ] = None,
) -> None:
    """Show the help of a command.

    \b
    Examples:
      qrecipe help
      qrecipe help plan
    """
    above = ctx.find_root()
    if command is None:
        out(above.get_help())
        return
    commands = getattr(above.command, "commands", {})
    if command not in commands:
        near = "".join(f" Did you mean {each!r}?" for each in nearest(command, commands))
        raise typer.BadParameter(f"there is no command {command!r}.{near}", param_hint="COMMAND")
    found = commands[command]
    out(found.get_help(typer.Context(found, parent=above, info_name=command)))
