"""``qrecipe compare``, ``sensitivity`` and ``profile``: what each operation costs."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import FOUND_SOMETHING, files_of, out, show, show_and_save
from qrecipe.cli.user_code import user_code, user_output


def compare(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Data,
    evaluate: options.Evaluate = None,
    log: options.Log = None,
    plot: options.Plot = None,
    html: options.Html = None,
    target_cpu: options.TargetCpu = "this",
    threads: options.Threads = None,
    pool: options.Pool = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Quantize a model and compare it with the float one, site by site.

    Both models run on all batches of --data. A function that returns fewer takes less time.

    \b
    Examples:
      qrecipe compare cnn.toml --model model.py:factory --data model.py:batches
      qrecipe compare cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --html sites.html
      qrecipe compare cnn.toml --model model.py:factory --data model.py:batches \\
          --pool processes:4 --log batches.log
    """
    from qrecipe.cli.html_pages import activations_of, write_page
    from qrecipe.cli.model_argument import get_ready, load_job
    from qrecipe.cli.pool import workers_of
    from qrecipe.cli.quantize_result import Metric
    from qrecipe.measure.pages.reports import comparison_page

    with user_code(plugin) as code:
        outputs = {"--plot": plot, "--html": html}
        get_ready(outputs, files_of(recipe), force=force, log=log, threads=threads)
        with user_output(), workers_of(pool, model, threads) as workers:
            job = load_job(code, recipe, model, data, evaluate, target_cpu)
            reference = job.model
            if job.recipe.transform.plugins:  # only these show what else was changed
                reference = qrecipe.transform(job.model, job.recipe, job.data())
            converted = qrecipe.quantize(
                reference, job.recipe, job.data(), target_cpu=job.target_cpu
            )
            report = qrecipe.compare(reference, converted, job.data(), resume=log, pool=workers)
        metric = None
        if job.evaluate is not None:
            with user_output():
                metric = Metric.of(job.evaluate, job.model.eval(), converted)
        show(report, as_json=json, plot=plot, metric=metric)
        if metric is not None and not json:
            out(f"{metric.name}: {metric.change}")
        origin = qrecipe.provenance(converted)
        about = job.about if metric is None else {**job.about, metric.name: metric.change}
        write_page(
            html,
            lambda: comparison_page(report, activations_of(converted, job.data), origin, about),
        )


def profile(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Data,
    plot: options.Plot = None,
    html: options.Html = None,
    threads: options.Threads = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Measure the time of each site, in float and in int8, and of the boundaries between them.

    \b
    Examples:
      qrecipe profile cnn.toml --model model.py:factory --data model.py:batches --threads 1
      qrecipe profile cnn.toml --model model.py:factory --data model.py:batches --html times.html
    """
    from qrecipe.cli.html_pages import plan_for_page, write_page
    from qrecipe.cli.model_argument import get_ready, load_job
    from qrecipe.measure.pages.reports import profile_page

    with user_code(plugin) as code:
        outputs = {"--plot": plot, "--html": html}
        get_ready(outputs, files_of(recipe), force=force, threads=threads)
        with user_output():
            job = load_job(code, recipe, model, data)
            report = qrecipe.profile(job.model, job.recipe, job.data())
        show(report, as_json=json, plot=plot)
        write_page(html, lambda: profile_page(report, plan_for_page(job), job.about))


def sensitivity(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Data,
    method: Annotated[
        Literal["exact", "estimate"],
        options.one_of(
            "--method",
            ("exact", "estimate"),
            "Run the rest of the model for each site, or estimate all in one pass.",
        ),
    ] = "exact",
    evaluate: Annotated[
        str | None,
        options.function(
            "--evaluate", "Rank by this function of a model instead of SQNR; higher is better."
        ),
    ] = None,
    keep_float: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Leave the N worst sites float.")
    ] = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Leave the sites below this SQNR float."),
    ] = None,
    overlay: Annotated[
        str | None, options.file("--out", "Write a recipe that leaves them float.")
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="BYTES", help="Memory for float activations; default: 2 GiB."),
    ] = None,
    log: options.Log = None,
    plot: options.Plot = None,
    html: options.Html = None,
    target_cpu: options.TargetCpu = "this",
    threads: options.Threads = None,
    pool: options.Pool = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Rank the sites by their effect on the output when only that site is quantized.

    The model runs for each site and batch, or each site is evaluated. A --data function that
    returns fewer batches takes less time, and so does --method estimate.

    \b
    Examples:
      qrecipe sensitivity cnn.toml --model model.py:factory --data model.py:batches
      qrecipe sensitivity cnn.toml --model model.py:factory --data model.py:batches \\
          --keep-float 2 --out cnn-overlay.toml
      qrecipe sensitivity cnn.toml --model model.py:factory --data model.py:batches \\
          --pool processes:4 --log sites.log
    """
    for option, value in (("--evaluate", evaluate), ("--pool", pool), ("--log", log)):
        if value is not None and method == "estimate":
            raise typer.BadParameter(f"{option} needs --method exact")
    _check_overlay(overlay, keep_float, min_sqnr_db, by_db=evaluate is None)
    from qrecipe.cli.html_pages import for_page, write_page
    from qrecipe.cli.model_argument import get_ready, load_job
    from qrecipe.cli.pool import workers_of
    from qrecipe.measure.pages.reports import ranking_page

    with user_code(plugin) as code:
        outputs = {"--out": overlay, "--plot": plot, "--html": html}
        get_ready(outputs, files_of(recipe), force=force, log=log, threads=threads)
        with user_output(), workers_of(pool, model, threads) as workers:
            job = load_job(code, recipe, model, data, evaluate, target_cpu)
            ranking = qrecipe.sensitivity(
                job.model,
                job.recipe,
                job.data(),
                method=method,
                evaluate=job.evaluate,
                memory_limit=memory_limit,
                resume=log,
                target_cpu=job.target_cpu,
                pool=workers,
            )
        save = partial(ranking.save_overlay, keep_float=keep_float, min_sqnr_db=min_sqnr_db)
        show_and_save(ranking, "overlay", overlay, save, as_json=json)
        if plot is not None:
            ranking.plot(plot)
        hurry = "the measurement was interrupted" if ranking.partial else None
        write_page(html, lambda: ranking_page(ranking, *for_page(job, hurry), job.about))
    if ranking.partial:
        raise typer.Exit(FOUND_SOMETHING)


def _check_overlay(
    overlay: str | None, keep_float: int | None, min_sqnr_db: float | None, *, by_db: bool
) -> None:
    if keep_float is not None and min_sqnr_db is not None:
        raise typer.BadParameter("pass either --keep-float or --min-sqnr-db")
    if (overlay is None) != (keep_float is None and min_sqnr_db is None):
        text = "--out FILE goes with --keep-float N or --min-sqnr-db DB"
        raise typer.BadParameter(text, param_hint="--out")
    if min_sqnr_db is not None and not by_db:
        raise typer.BadParameter("--evaluate does not rank by dB: use --keep-float")
