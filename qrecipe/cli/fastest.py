"""``qrecipe fastest``: which sites to leave float for speed."""

from __future__ import annotations

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import reported, show_and_save
from qrecipe.cli.outputs import files_of
from qrecipe.cli.user_code import user_code, user_output


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
    """Leave the sites float that are slower in int8 on this machine.

    Measures the sites, and the best choice against the recipe as it is and against float; what is
    not faster beyond noise changes nothing.

    \b
    Examples:
      qrecipe fastest cnn.toml --model model.py:factory --data model.py:batches --threads 1
      qrecipe fastest cnn.toml --model model.py:factory --data model.py:batches --out fast.toml
    """
    with reported(as_json=json):
        from qrecipe.cli.model_argument import get_ready, load_job

        with user_code(plugin) as code:
            get_ready({"--out": output}, files_of(recipe), force=force, threads=threads)
            with user_output():
                job = load_job(code, recipe, model, data, "this")
                result = qrecipe.fastest(job.model, job.recipe, job.data())
            show_and_save(result, "out", output, result.save, as_json=json)
