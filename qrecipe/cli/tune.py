"""``qrecipe suggest``, ``tune`` and ``fastest``: write recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import (
    FOUND_SOMETHING,
    check_distinct,
    files_of,
    hint,
    out,
    out_json,
    show_and_save,
)
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.files import write_atomically


def suggest(
    model: options.Model,
    input: options.Input = None,
    batches: Annotated[
        int | None,
        typer.Option(
            "--batches",
            min=1,
            metavar="N",
            help="How many calibration batches you have; they are not read. With few of them, "
            "another observer is chosen.",
        ),
    ] = None,
    output: options.Out = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Suggest a recipe to start from.

    Static for convolutional nets, dynamic if linear and recurrent layers dominate, both for a
    mixture. Rules that leave something float give the reason.

    \b
    Examples:
      qrecipe suggest --model model.py:factory --out cnn.toml
      qrecipe suggest --model torchvision.models:resnet18 --input 1x3x224x224 --batches 8
    """
    from qrecipe.authoring.suggest.suggest import suggestion
    from qrecipe.cli.model_argument import get_ready, load_subject, required_inputs
    from qrecipe.planning.faster_runtime import faster_runtime

    get_ready({"--out": output}, force=force)
    with user_code(plugin) as code, user_output():
        subject = load_subject(code, model, input)
        text = suggestion(subject.model, required_inputs(subject, model), batches)
    if output is not None:
        write_atomically(Path(output), text)
    recipe = qrecipe.parse_recipe(text)
    if json:
        out_json({"recipe": text, "fingerprint": recipe.fingerprint, "out": output})
    else:
        out(text.rstrip("\n") if output is None else f"written to {output}")
        if _is_static(recipe):
            hint(faster_runtime(has_convolutions=True))  # or it were dynamic


def _is_static(recipe: qrecipe.Recipe) -> bool:
    activations = [qconfig.activation for qconfig in recipe.qconfigs.values()]
    return any(spec is not None and not spec.is_dynamic for spec in activations)


def tune(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Data,
    evaluate: Annotated[
        str,
        options.function(
            "--evaluate",
            "A function that takes a model and returns its accuracy; higher is better.",
        ),
    ],
    max_drop: Annotated[
        float, typer.Option(min=0, metavar="X", help="How much accuracy may be lost.")
    ] = 0.01,
    max_trials: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Maximum number of trials.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Start no trial after that many seconds.")
    ] = None,
    log: options.Log = None,
    output: options.Out = None,
    pareto: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write the recipe of each trial that is more accurate than any faster one.",
        ),
    ] = None,
    html: options.Html = None,
    target_cpu: options.TargetCpu = "this",
    threads: options.Threads = None,
    pool: options.Pool = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Search for a recipe within an accuracy budget that leaves little float.

    The exit status is 1 if the budget was not met or the search was interrupted; the best recipe
    is written anyway.

    \b
    Examples:
      qrecipe tune cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --max-drop 0.005 --out tuned.toml
      qrecipe tune cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --log trials.json --max-seconds 600 --html tuning.html
      qrecipe tune cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --log trials.json --pool dask:tcp://HOST:8786
    """
    if max_seconds is not None and not max_seconds > 0:
        raise typer.BadParameter("must be above 0", param_hint="--max-seconds")
    from qrecipe.cli.html_pages import search_page, write_page
    from qrecipe.cli.model_argument import get_ready, load_job
    from qrecipe.cli.pool import workers_of
    from qrecipe.recipe.overlay import make_directory

    written = {"--out": output, "--html": html}
    with user_code(plugin) as code:
        check_distinct({"--log": log, "--pareto": pareto, **written}, files_of(recipe))
        get_ready(written, force=force, threads=threads)
        if pareto is not None:
            make_directory(Path(pareto))
        with user_output(), workers_of(pool, model, threads) as workers:
            job = load_job(code, recipe, model, data, evaluate, target_cpu)
            assert job.evaluate is not None
            result = qrecipe.tune(
                job.model,
                job.recipe,
                job.data(),
                job.evaluate,
                max_drop=max_drop,
                max_trials=max_trials,
                max_seconds=max_seconds,
                resume=log,
                target_cpu=job.target_cpu,
                pool=workers,
            )
        if pareto is not None:
            result.save_front(pareto)
        show_and_save(result, "out", output, result.save, as_json=json)
        write_page(html, lambda: search_page(job, result))
    if not result.reached or result.stopped == "interrupt":
        raise typer.Exit(FOUND_SOMETHING)


def fastest(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Data,
    output: options.Out = None,
    threads: options.Threads = None,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Leave sites float that are slower in int8 on this machine.

    Measures each site, then compares the best choice of float sites with the recipe and with the
    float model. The recipe only changes if that is faster beyond noise.

    \b
    Examples:
      qrecipe fastest cnn.toml --model model.py:factory --data model.py:batches --threads 1
      qrecipe fastest cnn.toml --model model.py:factory --data model.py:batches --out fast.toml
    """
    from qrecipe.cli.model_argument import get_ready, load_job

    with user_code(plugin) as code:
        get_ready({"--out": output}, files_of(recipe), force=force, threads=threads)
        with user_output():
            job = load_job(code, recipe, model, data)
            result = qrecipe.fastest(job.model, job.recipe, job.data())
        show_and_save(result, "out", output, result.save, as_json=json)
