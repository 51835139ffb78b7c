"""The arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qrecipe.recipe.schema import Executor

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A file, or a reference such as builtin:x86-static.",
        show_default=False,
    ),
]
ArtifactArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A file from save_quantized.", show_default=False)
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="FILE.py:NAME",
        help="A function that returns the model, or (model, example_inputs); "
        "also package.module:NAME.",
        show_default=False,
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of a random float32 input, such as 1x3x224x224; once for each model input.",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE.py:NAME",
        help="A function that returns an iterable of batches.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    str | None,
    typer.Option("--plot", metavar="FILE", help="Write a plot: .png, .svg or .pdf."),
]
HtmlOption = Annotated[
    str | None,
    typer.Option("--html", metavar="FILE", help="Write an HTML page with plots, plan and recipe."),
]
OutOption = Annotated[
    str | None,
    typer.Option("--out", metavar="FILE", help="Write the recipe to this file."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of torch threads; default: torch's choice."),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Import a module or FILE.py that registers observers or fake-quants; repeatable.",
    ),
]
TargetCpuOption = Annotated[
    Literal["this", "vnni"],
    typer.Option(
        "--target-cpu",
        help="Make the model for this CPU, or for x86 CPUs with VNNI even if this one has none.",
    ),
]
ExecutorOption = Annotated[
    Executor | None,
    typer.Option(
        "--executor",
        help="What carries the plan out, whatever the recipe says; default: chosen for the model.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")]
