"""``qrecipe fastest``: which sites to leave float for speed."""

from __future__ import annotations

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import out_and_save, reported
from qrecipe.cli.outputs import check_outputs, files_of
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
            check_outputs({"--out": output}, files_of(recipe), force=force)
            get_ready(threads, out=output)
            with user_output():
                job = load_job(code, recipe, model, data, "this")
                result = qrecipe.fastest(job.model, job.recipe, job.data())
            out_and_save(result, "out", output, result.save, as_json=json)
