"""What all commands have in common: how they are described and how they fail; and the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qrecipe.cli.output import out, reported
from qrecipe.errors.spelling import nearest


class Command(TyperCommand):
    """A command whose warnings and errors become plain lines.

    Its help names arguments without their Python types, such as ``list[str]``.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                vars(parameter)["display_type_rich"] = lambda ctx: None

    def invoke(self, ctx: Any) -> Any:
        given = ctx.params
        with reported(as_json=given.get("json", False), strict=given.get("strict", False)):
            return super().invoke(ctx)


def summary(command: Callable[..., None]) -> str:
    """The first sentence of a command's help, whole."""
    return (inspect.getdoc(command) or "").partition("\n\n")[0]


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
