"""``qrecipe compare`` and ``qrecipe sensitivity``: how much accuracy each operation costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qrecipe.cli.html_pages import ForPage, activations_of, planned_for_page, quantized_for_page
from qrecipe.cli.model_argument import load_subject
from qrecipe.cli.output import out, out_json
from qrecipe.cli.progress import bar
from qrecipe.cli.quantize import hints_for_command_line
from qrecipe.cli.user_code import UserCode, UserFunction, user_output
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.provenance import provenance
from qrecipe.measure.compare.comparison import compare, comparison_json
from qrecipe.measure.pages.page import check_writable, save_page
from qrecipe.measure.pages.plots import check_available
from qrecipe.measure.pages.reports import comparison_page, ranking_page
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.measure.sensitivity.ranking import Ranking, ranking_json
from qrecipe.pipeline import quantize
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.recipe.overlay import check_replaceable
from qrecipe.recipe.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; ``plot`` and ``html`` are files to write."""

    recipe: str
    model: str
    data: str
    plugins: Sequence[str]
    threads: int | None
    plot: str | None
    html: str | None
    target_cpu: TargetCpu


@dataclass(frozen=True, slots=True)
class Wish:
    """How to rank, and which overlay to write."""

    method: Literal["exact", "estimate"]
    evaluate: str | None
    memory_limit: int | None
    keep_float: int | None
    min_sqnr_db: float | None
    out: str | None


@dataclass(frozen=True, slots=True)
class _Job:
    recipe: Recipe
    model: nn.Module
    data: UserFunction
    evaluate: UserFunction | None
    target_cpu: TargetCpu


def compare_models(request: Request, *, as_json: bool) -> None:
    """Quantize, compare with the float model, and show the report."""
    with _loaded(request) as job:
        with bar("calibrating") as show:
            converted = quantize(
                job.model, job.recipe, job.data(), progress=show, target_cpu=job.target_cpu
            )
        with bar("comparing") as show:
            report = compare(job.model, converted, job.data(), progress=show)
        activations = activations_of(converted, job.data) if request.html is not None else ""
    # show the result before anything is written, which could fail
    if as_json:
        out_json(comparison_json(report))
    else:
        out(str(report))
    if request.plot is not None:
        report.plot(request.plot)
    if request.html is not None:
        save_page(comparison_page(report, activations, provenance(converted)), request.html)


def rank(request: Request, wish: Wish, *, as_json: bool) -> Ranking:
    """Rank the sites, show the ranking, and write the overlay if requested."""
    with _loaded(request, wish.evaluate) as job:
        if wish.out is not None:
            check_replaceable(Path(wish.out))
        with bar("measuring") as show:
            ranking = sensitivity(
                job.model,
                job.recipe,
                job.data(),
                method=wish.method,
                evaluate=job.evaluate,
                memory_limit=wish.memory_limit,
                progress=show,
                target_cpu=job.target_cpu,
            )
        quantized = None if request.html is None else _for_page(job, ranking)
    # show the result before anything is written, which could fail
    if as_json:
        out_json({**ranking_json(ranking), "overlay": wish.out})
    else:
        out(str(ranking))
    if wish.out is not None:
        ranking.save_overlay(wish.out, wish.keep_float, min_sqnr_db=wish.min_sqnr_db)
        if not as_json:
            out(f"\nwritten to {wish.out}")
    if request.plot is not None:
        ranking.plot(request.plot)
    if request.html is not None and quantized is not None:
        if isinstance(quantized, QRecipeError):
            raise quantized
        page = ranking_page(ranking, quantized.activations, quantized.origin)
        save_page(page, request.html)
    return ranking


def _for_page(job: _Job, ranking: Ranking) -> ForPage | QRecipeError:
    if ranking.partial:  # after an interrupt, don't keep the user waiting
        why = "the measurement was interrupted"
        return planned_for_page(job.model, job.recipe, job.data, why)
    return quantized_for_page(job.model, job.recipe, job.data, job.target_cpu)


@contextmanager
def _loaded(request: Request, evaluate: str | None = None) -> Iterator[_Job]:
    """Load the user's code, which stays importable and does not print to stdout inside."""
    if request.plot is not None or request.html is not None:
        check_available()
    if request.html is not None:
        check_writable(request.html)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with UserCode() as code, user_output(), hints_for_command_line():
        code.import_plugins(request.plugins)
        recipe = load_recipe(request.recipe)
        data = code.function(request.data, "--data")
        measure = None if evaluate is None else code.function(evaluate, "--evaluate")
        subject = load_subject(code, request.model, ())
        yield _Job(recipe, subject.model, data, measure, request.target_cpu)
