"""The commands. Each has a module, with its arguments, its help and its work.

Whatever needs torch is imported inside the commands: the others work without it, and start fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from qrecipe._version import __version__
from qrecipe.cli.bench import bench
from qrecipe.cli.check import check
from qrecipe.cli.command import Command, help_of, summary
from qrecipe.cli.diff import diff
from qrecipe.cli.drift import drift
from qrecipe.cli.export import export
from qrecipe.cli.init import init
from qrecipe.cli.inspect import inspect
from qrecipe.cli.listing import list_names, schema
from qrecipe.cli.measure import compare, profile, sensitivity
from qrecipe.cli.output import out
from qrecipe.cli.plan import explain, lock, plan
from qrecipe.cli.quantize import quantize
from qrecipe.cli.show import show
from qrecipe.cli.tune import fastest, suggest, tune

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
