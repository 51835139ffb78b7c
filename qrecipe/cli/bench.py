"""``qrecipe bench``: one recipe through every runtime that is installed."""

from __future__ import annotations

from shlex import join
from typing import TYPE_CHECKING, Annotated, cast

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import FOUND_SOMETHING, files_of, show
from qrecipe.cli.user_code import user_code, user_output

if TYPE_CHECKING:
    from qrecipe.runtimes.table import Name

_RUNTIMES = ("torch", "inductor", "executorch", "onnxruntime", "openvino")


def bench(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Data,
    evaluate: options.Evaluate = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Measure on N samples; default: the first batch."),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        options.one_of("--runtime", _RUNTIMES, "Run only this one; repeatable. Default: all."),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of threads of every runtime.")
    ] = 1,
    html: options.Html = None,
    strict: Annotated[
        bool, options.flag("--strict", "Treat warnings and failing runtimes as errors.")
    ] = False,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Measure a recipe in every runtime that is installed, in float and in int8.

    Each output is compared with the plan. The exit status is 1 if a runtime computes something
    else.

    \b
    Examples:
      qrecipe bench cnn.toml --model model.py:factory --data model.py:batches
      qrecipe bench cnn.toml --model model.py:factory --data model.py:batches \\
          --batch 1 --evaluate model.py:accuracy --html runtimes.html
    """
    from qrecipe.cli.html_pages import plan_for_page, write_page
    from qrecipe.cli.model_argument import get_ready, load_job
    from qrecipe.deployment.page import bench_page

    plugins = [word for name in plugin or () for word in ("--plugin", name)]
    with user_code(plugin) as code:
        get_ready({"--html": html}, files_of(recipe), force=force)
        with user_output():
            job = load_job(code, recipe, model, data, evaluate)
            result = qrecipe.bench(
                job.model,
                job.recipe,
                job.data(),
                evaluate=job.evaluate,
                batch_size=batch,
                threads=threads,
                runtimes=cast("list[Name] | None", runtime) or None,
                arguments=join([recipe, "--model", model, "--data", data, *plugins]),
            )
        show(result, as_json=json)
        write_page(html, lambda: bench_page(result, plan_for_page(job), job.about))
    if result.findings or (strict and result.failures):
        raise typer.Exit(FOUND_SOMETHING)
