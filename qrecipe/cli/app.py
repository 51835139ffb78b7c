"""The commands. Each has a module, with its arguments, its help and its work.

Whatever needs torch is imported inside the commands: the others work without it, and start fast.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from inspect import getdoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qrecipe._version import __version__
from qrecipe.cli.bench import bench
from qrecipe.cli.check import check
from qrecipe.cli.diff import diff
from qrecipe.cli.drift import drift
from qrecipe.cli.export import export
from qrecipe.cli.init import init
from qrecipe.cli.inspect import inspect
from qrecipe.cli.listing import list_names, schema
from qrecipe.cli.measure import compare, profile, sensitivity
from qrecipe.cli.output import out, reported
from qrecipe.cli.plan import explain, lock, plan
from qrecipe.cli.quantize import quantize
from qrecipe.cli.show import show
from qrecipe.cli.tune import fastest, suggest, tune
from qrecipe.errors.findings import Finding, QRecipeError
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
            try:
                return super().invoke(ctx)
            except SystemExit as error:  # commands leave with typer.Exit
                raise _left_by(error) from error


def _left_by(error: SystemExit) -> QRecipeError:
    """The error (QR601) for the user's model or loader that would end the process."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return QRecipeError(
        Finding(
            "QR601",
            f"your code ends the process in {frame.name}: SystemExit: {error}",
            hint="raise an exception there that says what is wrong",
            notes=(f"raised at {frame.filename}:{frame.lineno}",),
        )
    )


def summary(command: Callable[..., None]) -> str:
    """The first sentence of a command's help, whole."""
    return (getdoc(command) or "").partition("\n\n")[0]


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


app = typer.Typer(
    name="qrecipe",
    help="Quantize PyTorch models by recipes: planned before they run, verified afterwards.",
    epilog="Exit status: 0 success, 1 something was found, 2 wrong usage.",
    no_args_is_help=True,
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


_COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "check": check,
    "show": show,
    "plan": plan,
    "explain": explain,
    "quantize": quantize,
    "export": export,
    "inspect": inspect,
    "list": list_names,
    "compare": compare,
    "sensitivity": sensitivity,
    "profile": profile,
    "suggest": suggest,
    "tune": tune,
    "fastest": fastest,
    "bench": bench,
    "diff": diff,
    "drift": drift,
    "lock": lock,
    "schema": schema,
    "help": help_of,
}
for name, command in _COMMANDS.items():
    app.command(name, cls=Command, short_help=summary(command))(command)
