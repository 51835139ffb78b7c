"""``qrecipe quantize``: quantize a model and measure the result."""

from __future__ import annotations

from collections.abc import Iterable
from json import loads
from typing import TYPE_CHECKING, Annotated, Any

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import fail_on, out, out_json, reported
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.errors.findings import QRecipeWarning
from qrecipe.terminal.progress import activity

if TYPE_CHECKING:
    from torch import nn

    from qrecipe.cli.model_argument import Subject
    from qrecipe.pipeline import CompiledRecipe
    from qrecipe.planning.target_cpu import TargetCpu
    from qrecipe.recipe.recipe import Recipe


def quantize(
    recipe: options.Recipe,
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="A function that returns an iterable of calibration batches.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME", help="A function that takes a model and returns its accuracy."
        ),
    ] = None,
    input: options.Input = None,
    output: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Save the quantized model as safetensors."),
    ] = None,
    target_cpu: options.TargetCpu = "this",
    threads: options.Threads = None,
    strict: options.Strict = False,
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
    with reported(as_json=json, strict=strict):
        from qrecipe.cli.model_argument import get_ready, load_subject, required_inputs
        from qrecipe.cli.quantize_result import measure, result_json, result_text
        from qrecipe.execution.batches import peek

        get_ready(threads)
        with user_code(plugin) as code:
            with user_output():
                loaded = qrecipe.load_recipe(recipe)
                make_batches = None if data is None else code.function(data, "--data")
                accuracy = None if evaluate is None else code.function(evaluate, "--evaluate")
                subject = load_subject(code, model, input)
                batches: Iterable[Any] | None = None
                if make_batches is None:
                    first = required_inputs(subject, model)
                else:
                    first, batches = peek(make_batches())
                compiled = _compiled(subject, loaded, first, target_cpu)
            if not json:
                out(f"{compiled.plan}\n")
            if strict:
                fail_on(compiled.plan.warnings)
            with user_output():
                prepared = _prepared(compiled, batches)
                with activity("converting"):
                    converted = compiled.convert(prepared)
                if output is not None:
                    qrecipe.save_quantized(converted, output)
                # compare in eval mode, as the quantized copy is
                result = measure(subject.model.eval(), converted, first, accuracy, prepared)
        if json:
            out_json({"plan": loads(compiled.plan.to_json()), **result_json(result)})
        else:
            out(result_text(result))


def _compiled(
    subject: Subject, recipe: Recipe, first: Any, target_cpu: TargetCpu
) -> CompiledRecipe:
    from qrecipe.execution.batches import inputs_of_batch
    from qrecipe.model.call import Inputs
    from qrecipe.pipeline import compile_decided

    if subject.example_inputs is not None:
        inputs = Inputs.from_batch(subject.example_inputs)
        return compile_decided(subject.model, recipe, inputs, target_cpu)
    with inputs_of_batch(subject.model, first, None) as inputs:
        return compile_decided(subject.model, recipe, inputs, target_cpu)


def _prepared(compiled: CompiledRecipe, batches: Iterable[Any] | None) -> nn.Module:
    """The prepared model, calibrated if there are batches."""
    from qrecipe.process.warnings import held_back

    prepared = compiled._prepared()  # it shares the model's tensors: nobody trains it
    if batches is not None:
        with held_back([("QR234", QRecipeWarning)]):  # the result shows it
            qrecipe.calibrate(prepared, batches)
    elif any(site.mode == "static" for site in compiled.plan.sites):
        text = "this recipe has static rules: pass a function that returns calibration batches"
        raise typer.BadParameter(text, param_hint="--data")
    return prepared
