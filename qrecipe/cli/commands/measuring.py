"""The commands that measure: their arguments, help texts and exit statuses."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from qrecipe.cli.options import (
    DataOption,
    HtmlOption,
    JsonOption,
    ModelOption,
    PlotOption,
    PluginOption,
    RecipeArgument,
    TargetCpuName,
    TargetCpuOption,
    ThreadsOption,
)
from qrecipe.cli.output import FOUND_SOMETHING, needs_torch, reported


class RankingMethod(str, Enum):
    """How the effect of a site is measured."""

    exact = "exact"
    estimate = "estimate"


def compare(
    recipe: RecipeArgument,
    model: ModelOption,
    data: DataOption,
    plot: PlotOption = None,
    html: HtmlOption = None,
    target_cpu: TargetCpuOption = TargetCpuName.this,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Quantize a model and compare it with the float one, site by site.

    \b
    Examples:
      qrecipe compare cnn.toml --model model.py:factory --data model.py:batches
      qrecipe compare cnn.toml --model model.py:factory --data model.py:batches --html sites.html
    """
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli.measure import compare_models

        compare_models(
            recipe,
            model,
            data,
            plot=plot,
            html=html,
            target_cpu=target_cpu.value,
            threads=threads,
            plugins=plugin,
            as_json=json,
        )


def sensitivity(
    recipe: RecipeArgument,
    model: ModelOption,
    data: DataOption,
    method: Annotated[
        RankingMethod,
        typer.Option(help="Run the rest of the model for each site, or estimate all in one pass."),
    ] = RankingMethod.exact,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Rank by this function of a model instead of SQNR; higher is better.",
        ),
    ] = None,
    keep_float: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Leave the N worst sites float.")
    ] = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Leave the sites below this SQNR float."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write a recipe that leaves them float."),
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="BYTES", help="Memory for float activations; default: 2 GiB."),
    ] = None,
    plot: PlotOption = None,
    html: HtmlOption = None,
    target_cpu: TargetCpuOption = TargetCpuName.this,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    json: JsonOption = False,
) -> None:
    """Rank the sites by their effect on the output when only that site is quantized.

    \b
    Examples:
      qrecipe sensitivity cnn.toml --model model.py:factory --data model.py:batches
      qrecipe sensitivity cnn.toml --model model.py:factory --data model.py:batches \\
          --keep-float 2 --out cnn-overlay.toml
    """
    if (keep_float is not None) and (min_sqnr_db is not None):
        raise typer.BadParameter("pass either --keep-float or --min-sqnr-db")
    if (out is None) != (keep_float is None and min_sqnr_db is None):
        text = "--out FILE goes with --keep-float N or --min-sqnr-db DB"
        raise typer.BadParameter(text, param_hint="--out")
    if evaluate is not None and min_sqnr_db is not None:
        raise typer.BadParameter("--evaluate does not rank by dB: use --keep-float")
    if evaluate is not None and method is RankingMethod.estimate:
        raise typer.BadParameter("--evaluate needs --method exact")
    with reported(as_json=json):
        needs_torch()
        from qrecipe.cli.measure import rank

        ranking = rank(
            recipe,
            model,
            data,
            method=method.value,
            evaluate=evaluate,
            memory_limit=memory_limit,
            keep_float=keep_float,
            min_sqnr_db=min_sqnr_db,
            overlay=out,
            plot=plot,
            html=html,
            target_cpu=target_cpu.value,
            threads=threads,
            plugins=plugin,
            as_json=json,
        )
    if ranking.partial:
        raise typer.Exit(FOUND_SOMETHING)
