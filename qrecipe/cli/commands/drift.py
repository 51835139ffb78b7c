"""``qrecipe drift``: its arguments, help text and exit status."""

from __future__ import annotations

from typing import Annotated

import typer

from qrecipe.cli.options import (
    DataOption,
    HtmlOption,
    JsonOption,
    ModelOption,
    PlotOption,
    PluginOption,
    ThreadsOption,
)
from qrecipe.cli.output import FOUND_SOMETHING, needs_torch, reported


def drift(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A file from save_quantized.", show_default=False),
    ],
    model: ModelOption,
    data: DataOption,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SHARE",
            help="Fail if recalibration would move the ends of a range by more than this, "
            "in widths of the stored range.",
        ),
    ] = 0.5,
    max_clipped: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SHARE",
            help="Fail if recalibration would save more than this share of a tensor's values from "
            "clipping.",
        ),
    ] = 0.05,
    html: HtmlOption = None,
    plot: PlotOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Compare the ranges of a stored model with new data.

    The exit status is 1 if a range is off by more than a threshold.

    \b
    Examples:
      qrecipe drift model.safetensors --model model.py:factory --data model.py:batches
      qrecipe drift model.safetensors --model model.py:factory --data model.py:batches \\
          --threshold 0.2 --html drift.html
    """
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli.drift import look_for_drift

        found = look_for_drift(
            file,
            model,
            data,
            threshold=threshold,
            max_clipped=max_clipped,
            plot=plot,
            html=html,
            threads=threads,
            plugins=plugin,
            as_json=json,
        )
    if found:
        raise typer.Exit(FOUND_SOMETHING)
