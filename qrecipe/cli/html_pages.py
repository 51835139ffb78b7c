"""What report pages show besides the report itself: activations, plan, recipe, versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from qrecipe.authoring.tune.page import tune_page
from qrecipe.authoring.tune.result import TuningResult
from qrecipe.cli.model_argument import Job
from qrecipe.cli.user_code import UserFunction, user_output
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.batches import peek
from qrecipe.execution.provenance import Provenance, make_provenance, provenance
from qrecipe.measure.drift.drift import drift
from qrecipe.measure.pages.page import Page, save_page
from qrecipe.measure.pages.reports import Activations, Ranked
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.pipeline import plan, quantize
from qrecipe.process.warnings import unwarned


def write_page(path: str | None, make: Callable[[], Page]) -> None:
    """Make a page and write it, if there is a path for it."""
    if path is not None:
        with user_output():
            page = make()
        save_page(page, path)


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


def search_page(job: Job, result: TuningResult) -> Page:
    """The page about a search. Raises QRecipeError if its recipe can no longer be planned."""
    assert job.evaluate is not None
    tuned = replace(job, recipe=result.recipe)
    # after an interrupt, don't keep the user waiting
    hurry = "the search was interrupted" if result.stopped == "interrupt" else None
    activations, origin = for_page(tuned, hurry)
    ranking = _ranked(tuned, result, hurry)
    return tune_page(result, ranking, activations, origin, job.about, job.evaluate.name)


def _ranked(job: Job, result: TuningResult, hurry: str | None) -> Sequence[Ranked] | str:
    """The ranking of the search; if it needed none, a ranking of the recipe that it found."""
    if result.ranking:
        return [(cost.name, _known(cost.sqnr_db), cost.reason) for cost in result.ranking]
    if result.stopped == "seconds":
        return "time ran out before the sites were ranked"
    if hurry is not None:
        return hurry
    try:
        with unwarned():
            ranking = sensitivity(job.model, job.recipe, job.data(), target_cpu=job.target_cpu)
    except QRecipeError as error:
        return error.findings[0].message
    return [(site.name, _known(site.sqnr_db), ranking.reason(site)) for site in ranking.sites]


def _known(sqnr_db: float | None) -> float:
    return math.nan if sqnr_db is None else sqnr_db
