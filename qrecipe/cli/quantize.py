"""``qrecipe quantize``: quantize a model and measure the result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import typer
from torch import nn

from qrecipe.artifact.saving import save_quantized
from qrecipe.audit.ranges import observes
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.cli.model_argument import Subject, get_ready, load_subject, required_inputs
from qrecipe.cli.output import fail_on, out, out_json
from qrecipe.cli.quantize_result import Calibrated, Metric, Result, result_json, result_text
from qrecipe.cli.user_code import UserFunction, user_code, user_output
from qrecipe.errors.findings import Finding, QRecipeError, QRecipeWarning
from qrecipe.execution.batches import describe_batch, inputs_of_batch, peek
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.prepared import prepared_state
from qrecipe.measure.latency import compare_latency
from qrecipe.measure.sizes import model_size
from qrecipe.model.call import Inputs
from qrecipe.pipeline import CompiledRecipe, compile_decided
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import activity


def quantize(
    recipe: str,
    model: str,
    *,
    data: str | None,
    evaluate: str | None,
    shapes: Sequence[str] | None,
    output: str | None,
    target_cpu: TargetCpu,
    threads: int | None,
    plugins: Sequence[str] | None,
    as_json: bool,
    strict: bool,
) -> None:
    """Show the plan, quantize, and show the result; as JSON both in one document.

    With ``strict``, warnings of the plan are errors.
    """
    get_ready(threads)
    with user_code(plugins) as code:
        with user_output():
            loaded = load_recipe(recipe)
            make_batches = None if data is None else code.function(data, "--data")
            measure = None if evaluate is None else code.function(evaluate, "--evaluate")
            subject = load_subject(code, model, shapes)
            batches: Iterable[Any] | None = None
            if make_batches is None:
                first = required_inputs(subject, model)
            else:
                first, batches = peek(make_batches())
            compiled = _compiled(subject, loaded, first, target_cpu)
        if not as_json:
            out(f"{compiled.plan}\n")
        if strict:
            fail_on(compiled.plan.warnings)
        with user_output():
            prepared = _prepared(compiled, batches)
            with activity("converting"):
                converted = compiled.convert(prepared)
            if output is not None:
                save_quantized(converted, output)
            # compare in eval mode, as the quantized copy is
            result = _measure(
                subject.model.eval(), converted, first, measure, _calibrated(prepared)
            )
    if as_json:
        out_json({"plan": json.loads(compiled.plan.to_json()), **result_json(result)})
    else:
        out(result_text(result))


def _compiled(
    subject: Subject, recipe: Recipe, first: Any, target_cpu: TargetCpu
) -> CompiledRecipe:
    if subject.example_inputs is not None:
        inputs = Inputs.from_batch(subject.example_inputs)
        return compile_decided(subject.model, recipe, inputs, target_cpu)
    with inputs_of_batch(subject.model, first, None) as inputs:
        return compile_decided(subject.model, recipe, inputs, target_cpu)


def _prepared(compiled: CompiledRecipe, batches: Iterable[Any] | None) -> nn.Module:
    """The prepared model, calibrated if there are batches."""
    prepared = compiled.prepare()
    if batches is not None:
        with held_back([("QR234", QRecipeWarning)]):  # the result shows it
            calibrate(prepared, batches)
    elif any(site.mode == "static" for site in compiled.plan.sites):
        text = "this recipe has static rules: pass a function that returns calibration batches"
        raise typer.BadParameter(text, param_hint="--data")
    return prepared


def _calibrated(prepared: nn.Module) -> Calibrated | None:
    state = prepared_state(prepared)
    if not (state.batches and observes(prepared)):
        return None
    return Calibrated(state.batches, state.first_weight, state.clipping)


def _measure(
    model: nn.Module,
    converted: nn.Module,
    first: Any,
    evaluate: UserFunction | None,
    calibrated: Calibrated | None,
) -> Result:
    inputs = Inputs.from_batch(first)
    with torch.no_grad():
        return Result(
            metric=None if evaluate is None else _metric(evaluate, model, converted),
            float_size=model_size(model),
            quantized_size=model_size(converted),
            latency=compare_latency(model, converted, inputs),
            sqnr_db=output_sqnr_db(inputs.call(model), inputs.call(converted)),
            inputs=describe_batch(first),
            calibrated=calibrated,
        )


def _metric(evaluate: UserFunction, model: nn.Module, converted: nn.Module) -> Metric:
    # not around the latency: updating the screen would take time from it
    with activity("evaluating"):
        return Metric(evaluate.name, _number(evaluate, model), _number(evaluate, converted))


def _number(evaluate: UserFunction, model: nn.Module) -> float:
    value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        text = f"{evaluate.name}() returns a {type(value).__name__}, not a number"
        hint = "return the metric of the given model as a float"
        raise QRecipeError(Finding("QR601", text, hint=hint)) from None
