"""What report pages show besides the report itself: activations, plan, recipe, versions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from qrecipe.cli.model_argument import Job
from qrecipe.cli.user_code import UserFunction
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.batches import peek
from qrecipe.execution.provenance import Provenance, make_provenance, provenance
from qrecipe.measure.drift.drift import drift
from qrecipe.measure.pages.reports import Activations, Ranked
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.pipeline import plan, quantize
from qrecipe.process.warnings import unwarned


def named(model: str, data: str, recipe: str, evaluate: str | None = None) -> dict[str, str]:
    """What a command measured, as it was named there."""
    given = {"recipe": recipe, "model": model, "data": data}
    return given if evaluate is None else {**given, "evaluate": evaluate}


def activations_of(converted: nn.Module, data: UserFunction) -> Activations:
    """The activations on the caller's data, or why there are none to show."""
    try:
        with unwarned():
            return drift(converted, data())
    except QRecipeError as error:
        return error.findings[0].message


def for_page(job: Job, hurry: str | None = None) -> tuple[Activations, Provenance]:
    """The activations of the model with all sites quantized, and its provenance.

    Where quantizing fails, or if ``hurry`` says why not to wait for it, the plan alone and why
    there are no activations. Raises QRecipeError if there is no plan.
    """
    plain = replace(job.recipe, phase="ptq")
    with unwarned():
        if hurry is None:
            try:
                converted = quantize(job.model, plain, job.data(), target_cpu=job.target_cpu)
                return activations_of(converted, job.data), provenance(converted)
            except QRecipeError as error:
                hurry = error.findings[0].message
        return hurry, plan_for_page(job)


def plan_for_page(job: Job) -> Provenance:
    """The provenance that a model quantized without training would have."""
    plain = replace(job.recipe, phase="ptq")
    with unwarned():
        first, _ = peek(job.data())
        return make_provenance(plain, plan(job.model, plain, first), ())


def ranked_for_page(job: Job) -> Sequence[Ranked] | str:
    """The sites ranked by SQNR, or why they have none."""
    try:
        with unwarned():
            ranking = sensitivity(job.model, job.recipe, job.data(), target_cpu=job.target_cpu)
    except QRecipeError as error:
        return error.findings[0].message
    return [
        (site.name, math.nan if site.sqnr_db is None else site.sqnr_db, ranking.reason(site))
        for site in ranking.sites
    ]
