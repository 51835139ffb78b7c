"""What report pages show besides the report itself: activations, plan, recipe, versions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from qrecipe.cli.model_argument import Job
from qrecipe.cli.user_code import UserFunction
from qrecipe.errors.findings import QRecipeError, QRecipeWarning
from qrecipe.execution.batches import peek
from qrecipe.execution.provenance import Provenance, make_provenance, provenance
from qrecipe.measure.drift.drift import drift
from qrecipe.measure.pages.reports import Activations, Ranked
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.pipeline import plan, quantize


@dataclass(frozen=True, slots=True)
class ForPage:
    """The activations of a quantized model, and its provenance."""

    activations: Activations
    origin: Provenance


def activations_of(converted: nn.Module, data: UserFunction) -> Activations:
    """The activations on the caller's data, or why there are none to show."""
    try:
        with _without_warnings():
            return drift(converted, data())
    except QRecipeError as error:
        return error.findings[0].message


def quantized_for_page(job: Job) -> ForPage | QRecipeError:
    """The model with all sites quantized; the plan alone where that fails, or why there is none.

    Raises nothing: the measurement must still be shown.
    """
    plain = replace(job.recipe, phase="ptq")
    try:
        with _without_warnings():
            converted = quantize(job.model, plain, job.data(), target_cpu=job.target_cpu)
    except QRecipeError as error:
        return planned_for_page(job, error.findings[0].message)
    return ForPage(activations_of(converted, job.data), provenance(converted))


def planned_for_page(job: Job, why: str) -> ForPage | QRecipeError:
    """Only the plan, and ``why`` there are no activations. Raises nothing either."""
    try:
        with _without_warnings():
            first, _ = peek(job.data())
            plain = replace(job.recipe, phase="ptq")
            return ForPage(why, make_provenance(plain, plan(job.model, plain, first), ()))
    except QRecipeError as error:
        return error


def ranked_for_page(job: Job) -> Sequence[Ranked] | str:
    """The sites ranked by SQNR, or why they have none. Raises nothing either."""
    try:
        with _without_warnings():
            ranking = sensitivity(job.model, job.recipe, job.data(), target_cpu=job.target_cpu)
    except QRecipeError as error:
        return error.findings[0].message
    return [
        (site.name, math.nan if site.sqnr_db is None else site.sqnr_db, ranking.reason(site))
        for site in ranking.sites
    ]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings: the command itself has already shown them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        yield
