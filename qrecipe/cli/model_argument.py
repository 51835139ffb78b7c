"""The model of a command, what to run it on, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

import qrecipe
from qrecipe.cli.output import check_outputs
from qrecipe.cli.user_code import UserCode, UserFunction
from qrecipe.errors.findings import QRecipeError, QRecipeWarning
from qrecipe.execution.batches import inputs_of_batch, peek, rereadable
from qrecipe.measure.pages.charts import check_available
from qrecipe.measure.pages.page import check_writable
from qrecipe.model.call import Inputs
from qrecipe.model.unfit import instead_of_model
from qrecipe.pipeline import CompiledRecipe, compile_decided
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.process.warnings import held_back
from qrecipe.recipe.overlay import check_replaceable
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.transforms.transform import ready

_MAX_ELEMENTS = 2**31
_SHAPE = re.compile("[0-9]{1,10}(x[0-9]{1,10})*")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and one batch of inputs if the user gives one."""

    model: nn.Module
    example_inputs: Any | None


@dataclass(frozen=True, slots=True)
class Job:
    """What a command measures, loaded; ``about`` is how the command line names it."""

    recipe: Recipe
    model: nn.Module
    data: UserFunction
    evaluate: UserFunction | None
    target_cpu: TargetCpu
    about: Mapping[str, str]


def load_job(
    code: UserCode,
    recipe: str,
    model: str,
    data: str,
    evaluate: str | None = None,
    target_cpu: TargetCpu = "this",
) -> Job:
    """The recipe, the model, the batches and the evaluation, named as on the command line."""
    loaded, batches = load_recipe(recipe), code.function(data, "--data")
    measure = None if evaluate is None else code.function(evaluate, "--evaluate")
    about = {"recipe": recipe, "model": model, "data": data}
    if evaluate is not None:
        about["evaluate"] = evaluate
    return Job(loaded, load_subject(code, model).model, batches, measure, target_cpu, about)


def get_ready(
    outputs: Mapping[str, str | None],
    reads: Iterable[str] = (),
    *,
    force: bool,
    log: str | None = None,
    threads: int | None = None,
) -> None:
    """Find out what could not be written before anything runs, and set the threads of torch.

    The arguments are those of `check_outputs`; ``--out`` is a recipe here.
    """
    check_outputs(outputs, reads, force=force, log=log)
    html, out = outputs.get("--html"), outputs.get("--out")
    if html is not None or outputs.get("--plot") is not None:
        check_available()
    if html is not None:
        check_writable(html)
    if out is not None:
        check_replaceable(Path(out))
    set_threads(threads)


def set_threads(threads: int | None) -> None:
    """Set the number of torch threads, or keep it if that is None."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_subject(code: UserCode, name: str, shapes: Sequence[str] | None = None) -> Subject:
    """What the factory of that name gives; inputs of the ``shapes``, if any, take the place of its.

    Raises QRecipeError (QR601) if the factory fails or does not return a model.
    """
    inputs = random_inputs(shapes) if shapes else None
    code.has_random_inputs = inputs is not None
    result = code.function(name, "--model")()
    model, examples = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        what, hint = instead_of_model(model)
        hint = f"{hint}; or a tuple (model, example_inputs)"
        raise QRecipeError.of("QR601", f"{name} returns {what}, not a model", hint=hint)
    return Subject(model, examples if inputs is None else inputs)


def required_inputs(subject: Subject, name: str) -> Any:
    """The subject's example inputs. Raises BadParameter if it has none."""
    if subject.example_inputs is None:
        text = f"{name} returns no example inputs: pass their shapes, as in --input 1x3x224x224"
        raise typer.BadParameter(text, param_hint="--input")
    return subject.example_inputs


def random_inputs(shapes: Sequence[str]) -> tuple[Tensor, ...]:
    """Normally distributed float32 tensors, equal in every run."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(_shape(text), generator=generator) for text in shapes)


def _shape(text: str) -> list[int]:
    shape = [int(size) for size in text.split("x")] if _SHAPE.fullmatch(text) else []
    if not 0 < math.prod(shape) <= _MAX_ELEMENTS or not shape:
        text = f'"{text}" is not a shape: separate sizes by x, as in 1x3x224x224'
        raise typer.BadParameter(text, param_hint="--input")
    return shape


def subject_and_batches(
    code: UserCode,
    model: str,
    data: str | None,
    shapes: Sequence[str] | None,
    recipe: Recipe | None = None,
) -> tuple[Subject, Any, Iterable[Any] | None]:
    """The model, what to run it on first, and the batches of ``data``, if that is given.

    The model is transformed if the recipe says so.
    """
    make_batches = None if data is None else code.function(data, "--data")
    subject = load_subject(code, model, shapes)
    transforms = recipe is not None and recipe.transform.changes
    if make_batches is None:
        if transforms:
            text = "this recipe transforms the model: pass a function that returns batches"
            raise typer.BadParameter(text, param_hint="--data")
        return subject, required_inputs(subject, model), None
    batches = make_batches()
    if recipe is not None and transforms:
        batches = rereadable(batches, recipe.calibration.max_batches)
        subject = replace(subject, model=ready(subject.model, recipe, batches))
    return subject, *peek(batches)


def compiled_for(
    subject: Subject, recipe: Recipe, first: Any, target_cpu: TargetCpu
) -> CompiledRecipe:
    """The recipe compiled for the example inputs, or for the first batch without them."""
    if subject.example_inputs is not None:
        inputs = Inputs.from_batch(subject.example_inputs)
        return compile_decided(subject.model, recipe, inputs, target_cpu)
    with inputs_of_batch(subject.model, first, None) as inputs:
        return compile_decided(subject.model, recipe, inputs, target_cpu)


def prepared_on(compiled: CompiledRecipe, batches: Iterable[Any] | None) -> nn.Module:
    """The prepared model, calibrated if there are batches."""
    prepared = compiled._prepared()  # it shares the model's tensors: nobody trains it
    if batches is not None:
        with held_back([("QR234", QRecipeWarning)]):  # the result shows it
            qrecipe.calibrate(prepared, batches)
    elif any(site.mode == "static" for site in compiled.plan.sites):
        text = "this recipe has static rules: pass a function that returns calibration batches"
        raise typer.BadParameter(text, param_hint="--data")
    return prepared
