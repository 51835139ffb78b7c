"""``qrecipe quantize``: quantize a model and measure the result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import typer
from torch import nn

from qrecipe.artifact.saving import save_quantized
from qrecipe.audit.ranges import observes
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.cli.model_argument import Subject, load_subject, required_inputs
from qrecipe.cli.output import fail_on, out, out_json
from qrecipe.cli.progress import activity, bar
from qrecipe.cli.quantize_result import Calibrated, Metric, Result, result_json, result_text
from qrecipe.cli.user_code import UserCode, UserFunction, user_output
from qrecipe.errors.findings import CalibrationError, Finding, QRecipeError, QRecipeWarning
from qrecipe.execution.batches import describe_batch, inputs_of_batch, peek
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.prepared import prepared_state
from qrecipe.measure.latency import compare_latency
from qrecipe.measure.sizes import model_size
from qrecipe.model.call import Inputs
from qrecipe.pipeline import CompiledRecipe, compile_decided
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import load_recipe


@dataclass(frozen=True, slots=True)
class Request:
    """The command line."""

    recipe: str
    model: str
    data: str | None
    evaluate: str | None
    shapes: Sequence[str]
    plugins: Sequence[str]
    threads: int | None
    output: str | None
    target_cpu: TargetCpu


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything that was loaded, and the compiled recipe."""

    model: nn.Module
    compiled: CompiledRecipe
    first: Any
    batches: Iterable[Any] | None
    evaluate: UserFunction | None


def quantize(request: Request, *, as_json: bool, strict: bool) -> None:
    """Show the plan, quantize, and show the result; as JSON in one document.

    With ``strict``, warnings of the plan are errors.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with UserCode() as code:
        with user_output():
            job = _load(code, request)
        if not as_json:
            out(f"{job.compiled.plan}\n")
        if strict:
            fail_on(job.compiled.plan.warnings)
        with user_output():
            prepared = _prepared(job)
            with activity("converting"):
                converted = job.compiled.convert(prepared)
            if request.output is not None:
                save_quantized(converted, request.output)
            result = _measure(job, converted, _calibrated(prepared))
    if as_json:
        out_json({"plan": json.loads(job.compiled.plan.to_json()), **result_json(result)})
    else:
        out(result_text(result))


def _load(code: UserCode, request: Request) -> _Job:
    code.import_plugins(request.plugins)
    recipe = load_recipe(request.recipe)
    data = None if request.data is None else code.function(request.data, "--data")
    evaluate = None if request.evaluate is None else code.function(request.evaluate, "--evaluate")
    subject = load_subject(code, request.model, request.shapes)
    first, batches = _batches(subject, data, request.model)
    target = request.target_cpu
    if subject.example_inputs is not None:
        inputs = Inputs.from_batch(subject.example_inputs)
        compiled = compile_decided(subject.model, recipe, inputs, target)
    else:
        with hints_for_command_line(), inputs_of_batch(subject.model, first, None) as inputs:
            compiled = compile_decided(subject.model, recipe, inputs, target)
    # compare in eval mode, as the quantized copy is
    return _Job(subject.model.eval(), compiled, first, batches, evaluate)


def _batches(
    subject: Subject, data: UserFunction | None, model: str
) -> tuple[Any, Iterable[Any] | None]:
    """A first batch, and the calibration batches, if any."""
    if data is None:
        return required_inputs(subject, model), None
    return peek(data())


def _prepared(job: _Job) -> nn.Module:
    """The prepared model, calibrated if there are batches."""
    prepared = job.compiled.prepare()
    if job.batches is not None:
        told = [("QR234", QRecipeWarning)]  # the result shows it
        with bar("calibrating") as show, hints_for_command_line(), held_back(told):
            calibrate(prepared, job.batches, progress=show)
    elif any(site.mode == "static" for site in job.compiled.plan.sites):
        text = "this recipe has static rules: pass a function that returns calibration batches"
        raise typer.BadParameter(text, param_hint="--data")
    return prepared


def _calibrated(prepared: nn.Module) -> Calibrated | None:
    state = prepared_state(prepared)
    if not (state.batches and observes(prepared)):
        return None
    return Calibrated(state.batches, state.first_weight, state.clipping)


def _measure(job: _Job, converted: nn.Module, calibrated: Calibrated | None) -> Result:
    inputs = Inputs.from_batch(job.first)
    with torch.no_grad():
        return Result(
            metric=None if job.evaluate is None else _metric(job.evaluate, job.model, converted),
            float_size=model_size(job.model),
            quantized_size=model_size(converted),
            latency=compare_latency(job.model, converted, inputs),
            sqnr_db=output_sqnr_db(inputs.call(job.model), inputs.call(converted)),
            inputs=describe_batch(job.first),
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


@contextmanager
def hints_for_command_line() -> Iterator[None]:
    """Reword the library's hint about batches, which names a Python argument."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError([_without_forward(finding) for finding in error.findings]) from error


def _without_forward(finding: Finding) -> Finding:
    if finding.hint is None or "forward=" not in finding.hint:
        return finding
    fault, _, call = finding.hint.rpartition("pass forward=lambda model, batch: model(")
    hint = "let the function of --data return the model's inputs only, without labels"
    if fault and call.endswith(")") and "labels" not in fault:
        hint = f"{fault}let the function of --data return {call[:-1].lstrip('*')} for each batch"
    return replace(finding, hint=hint)
