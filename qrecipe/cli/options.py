"""The arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from json import loads
from typing import Annotated, Any, Literal, get_args

import typer

from qrecipe.errors.spelling import nearest
from qrecipe.recipe import schema


def one_of(option: str, words: Sequence[str], help: str) -> Any:
    """An option that takes one of these words, and names the nearest one for another."""

    def read(word: str) -> str:
        if word in words:
            return word
        text = f"{word!r} is not one of {', '.join(map(repr, words))}."
        near = [f"Did you mean {each!r}?" for each in nearest(word, words)]
        raise typer.BadParameter(" ".join([text, *near]))

    return typer.Option(option, metavar=f"<{'|'.join(words)}>", parser=read, help=help)


def _pool(text: str) -> str:
    """``processes:N`` or ``dask:ADDRESS``."""
    kind, _, value = text.partition(":")
    problem = None
    if kind not in ("processes", "dask"):
        near = [f" Did you mean {each!r}?" for each in nearest(kind, ("processes", "dask"))]
        problem = "".join([f"{kind!r} is not a kind of pool.", *near])
    elif kind == "processes" and not (value.isascii() and value.isdecimal() and int(value) > 0):
        problem = f"{value!r} is not a number of processes."
    elif kind == "dask" and not value:
        problem = "the address of the scheduler is missing."
    if problem is not None:
        raise typer.BadParameter(f"{problem} Write processes:4, or dask:tcp://HOST:8786.")
    return text


def argument(metavar: str, help: str) -> Any:
    """A positional argument that has to be given."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def file(option: str, help: str) -> Any:
    """An option that names a file."""
    return typer.Option(option, metavar="FILE", help=help, show_default=False)


def function(option: str, help: str) -> Any:
    """An option that names a function of the user."""
    return typer.Option(option, metavar="FILE.py:NAME", help=help, show_default=False)


def flag(option: str, help: str) -> Any:
    """An option without a value."""
    return typer.Option(option, help=help)


Recipe = Annotated[str, argument("RECIPE", "A file, or a reference such as builtin:x86-static.")]
Artifact = Annotated[str, argument("FILE", "A file from save_quantized.")]
Model = Annotated[
    str,
    function(
        "--model",
        "A function that returns the model, or (model, example_inputs); also package.module:NAME.",
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of a random float32 input, such as 1x3x224x224; once for each model input.",
    ),
]
Data = Annotated[str, function("--data", "A function that returns an iterable of batches.")]
Batches = Annotated[
    str | None,
    function("--data", "A function that returns an iterable of calibration batches."),
]
Evaluate = Annotated[
    str | None,
    function("--evaluate", "A function that takes a model and returns its accuracy."),
]
Constants = Annotated[
    str,
    typer.Option(
        metavar="JSON",
        help='Arguments of forward that the model was quantized with, such as {"times": 3}.',
    ),
]
Plot = Annotated[str | None, file("--plot", "Write a plot: .png, .svg or .pdf.")]
Html = Annotated[str | None, file("--html", "Write an HTML page with plots, plan and recipe.")]
Out = Annotated[str | None, file("--out", "Write the recipe to this file.")]
Log = Annotated[
    str | None,
    typer.Option(
        "--log",
        "--resume",
        metavar="FILE",
        help="Record finished work in this file, and continue from it if it exists.",
        show_default=False,
    ),
]
Force = Annotated[bool, flag("--force", "Replace files that exist.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="Number of torch threads; default: torch's choice."
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        "--pool",
        metavar="processes:N|dask:ADDRESS",
        parser=_pool,
        help="Measure in N processes, or on the workers of a Dask scheduler; one thread each, "
        "unless --threads says otherwise.",
    ),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Import a module or FILE.py that registers observers or fake-quants; repeatable.",
    ),
]
TargetCpu = Annotated[
    Literal["this", "vnni"],
    one_of(
        "--target-cpu",
        ("this", "vnni"),
        "Make the model for this CPU, or for x86 CPUs with VNNI even if this one has none.",
    ),
]
Executor = Annotated[
    schema.Executor | None,
    one_of(
        "--executor",
        get_args(schema.Executor),
        "The executor, whatever the recipe says; default: chosen for the model.",
    ),
]
Json = Annotated[bool, flag("--json", "Print one JSON document.")]
Strict = Annotated[bool, flag("--strict", "Treat warnings as errors.")]


def table(constants: str) -> dict[str, Any]:
    """The table that ``--constants`` gives as JSON."""
    try:
        return dict(loads(constants).items())
    except (ValueError, AttributeError):
        raise typer.BadParameter("it is not a JSON object", param_hint="--constants") from None
