"""``qrecipe quantize``: quantize a model and measure the result."""

from __future__ import annotations

from typing import Annotated

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import check_outputs, files_of, out, show, show_plan
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.terminal.progress import activity


def quantize(
    recipe: options.Recipe,
    model: options.Model,
    data: options.Batches = None,
    evaluate: options.Evaluate = None,
    input: options.Input = None,
    output: Annotated[
        str | None, options.file("--out", "Save the quantized model as safetensors.")
    ] = None,
    target_cpu: options.TargetCpu = "this",
    executor: options.Executor = None,
    threads: options.Threads = None,
    strict: options.Strict = False,
    force: options.Force = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Quantize a model and compare it with the float one.

    Shows the plan, then accuracy, size, latency and the SQNR of the output.

    \b
    Examples:
      qrecipe quantize builtin:x86-static --model model.py:factory --data model.py:batches
      qrecipe quantize cnn.toml --model model.py:factory --data model.py:batches \\
          --evaluate model.py:accuracy --threads 1 --out model.safetensors
    """
    from qrecipe.cli.model_argument import (
        compiled_for,
        prepared_on,
        set_threads,
        subject_and_batches,
    )
    from qrecipe.cli.quantize_result import measure
    from qrecipe.planning.asked import executed_by

    with user_code(plugin) as code:
        check_outputs({"--out": output}, files_of(recipe), force=force)
        set_threads(threads)
        with user_output():
            loaded = executed_by(qrecipe.load_recipe(recipe), executor)
            accuracy = None if evaluate is None else code.function(evaluate, "--evaluate")
            subject, first, batches = subject_and_batches(code, model, data, input, loaded)
            compiled = compiled_for(subject, loaded, first, target_cpu)
        show_plan(compiled.plan, as_json=json, strict=strict)
        with user_output():
            prepared = prepared_on(compiled, batches)
            with activity("converting"):
                converted = compiled.convert(prepared)
            if output is not None:
                qrecipe.save_quantized(converted, output)
            # compare in eval mode, as the quantized copy is
            result = measure(subject.model.eval(), converted, first, accuracy, prepared)
    show(result, as_json=json, plan=compiled.plan.to_dict())
    if output is not None and not json:
        out(f"\nwritten to {output}")
