"""A model that a command quantizes: loaded, compiled, and calibrated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import typer
from torch import nn

import qrecipe
from qrecipe.cli.model_argument import Subject, load_subject, required_inputs
from qrecipe.cli.user_code import UserCode
from qrecipe.errors.findings import QRecipeWarning
from qrecipe.execution.batches import inputs_of_batch, peek, rereadable
from qrecipe.model.call import Inputs
from qrecipe.pipeline import CompiledRecipe, compile_decided
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import Recipe
from qrecipe.transforms.transform import ready


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
