"""``qrecipe drift``: check whether a stored model still fits the data."""

from __future__ import annotations

from typing import Annotated

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import FOUND_SOMETHING, out, out_json
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.terminal.report import plain


def drift(
    file: options.Artifact,
    model: options.Model,
    data: options.Data,
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
    constants: options.Constants = "{}",
    html: options.Html = None,
    plot: options.Plot = None,
    threads: options.Threads = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Compare the ranges of a stored model with new data.

    The exit status is 1 if a range is off by more than a threshold.

    \b
    Examples:
      qrecipe drift model.safetensors --model model.py:factory --data model.py:batches
      qrecipe drift model.safetensors --model model.py:factory --data model.py:batches \\
          --threshold 0.2 --html drift.html
    """
    from qrecipe.cli.html_pages import write_page
    from qrecipe.cli.model_argument import get_ready, load_subject
    from qrecipe.measure.pages.reports import drift_page

    get_ready({"--plot": plot, "--html": html}, force=force, threads=threads)
    given = options.table(constants)
    with user_code(plugin) as code, user_output():
        batches = code.function(data, "--data")
        converted = qrecipe.load_quantized(file, load_subject(code, model).model, constants=given)
        report = qrecipe.drift(converted, batches())
    # show the result before anything is written, which could fail
    drifted = report.drifted(threshold, max_clipped=max_clipped)
    if json:
        above = [{"name": site.name, "tensor": site.tensor} for site in drifted]
        thresholds = {"threshold": threshold, "max_clipped": max_clipped}
        out_json({**plain(report), **thresholds, "drifted": above})
    else:
        out(report.text(threshold, max_clipped=max_clipped))
    if plot is not None:
        report.plot(plot)
    origin, about = qrecipe.provenance(converted), {"model": model, "data": data, "file": file}
    write_page(html, lambda: drift_page(report, origin, about, threshold, max_clipped=max_clipped))
    if drifted:
        raise typer.Exit(FOUND_SOMETHING)
