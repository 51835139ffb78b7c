"""``qrecipe compare`` and ``qrecipe sensitivity``: how much accuracy each operation costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qrecipe.cli.html_pages import ForPage, activations_of, planned_for_page, quantized_for_page
from qrecipe.cli.model_argument import Job, get_ready, load_job
from qrecipe.cli.output import out, out_json
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.provenance import provenance
from qrecipe.measure.compare.comparison import compare, comparison_json
from qrecipe.measure.pages.page import save_page
from qrecipe.measure.pages.reports import comparison_page, ranking_page
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.measure.sensitivity.ranking import Ranking, ranking_json
from qrecipe.pipeline import quantize
from qrecipe.planning.target_cpu import TargetCpu


def compare_models(
    recipe: str,
    model: str,
    data: str,
    *,
    plot: str | None,
    html: str | None,
    target_cpu: TargetCpu,
    threads: int | None,
    plugins: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Quantize, compare with the float model, and show the report."""
    get_ready(threads, plot, html)
    with user_code(plugins) as code, user_output():
        job = load_job(code, recipe, model, data, target_cpu)
        converted = quantize(job.model, job.recipe, job.data(), target_cpu=target_cpu)
        report = compare(job.model, converted, job.data())
        activations = activations_of(converted, job.data) if html is not None else ""
    # show the result before anything is written, which could fail
    if as_json:
        out_json(comparison_json(report))
    else:
        out(str(report))
    if plot is not None:
        report.plot(plot)
    if html is not None:
        save_page(comparison_page(report, activations, provenance(converted)), html)


def rank(
    recipe: str,
    model: str,
    data: str,
    *,
    method: Literal["exact", "estimate"],
    evaluate: str | None,
    memory_limit: int | None,
    keep_float: int | None,
    min_sqnr_db: float | None,
    overlay: str | None,
    plot: str | None,
    html: str | None,
    target_cpu: TargetCpu,
    threads: int | None,
    plugins: Sequence[str] | None,
    as_json: bool,
) -> Ranking:
    """Rank the sites, show the ranking, and write the overlay if requested."""
    get_ready(threads, plot, html, overlay)
    with user_code(plugins) as code, user_output():
        measure = None if evaluate is None else code.function(evaluate, "--evaluate")
        job = load_job(code, recipe, model, data, target_cpu)
        ranking = sensitivity(
            job.model,
            job.recipe,
            job.data(),
            method=method,
            evaluate=measure,
            memory_limit=memory_limit,
            target_cpu=target_cpu,
        )
        quantized = None if html is None else _for_page(job, ranking)
    # show the result before anything is written, which could fail
    if as_json:
        out_json({**ranking_json(ranking), "overlay": overlay})
    else:
        out(str(ranking))
    if overlay is not None:
        ranking.save_overlay(overlay, keep_float, min_sqnr_db=min_sqnr_db)
        if not as_json:
            out(f"\nwritten to {overlay}")
    if plot is not None:
        ranking.plot(plot)
    if html is not None and quantized is not None:
        if isinstance(quantized, QRecipeError):
            raise quantized
        save_page(ranking_page(ranking, quantized.activations, quantized.origin), html)
    return ranking


def _for_page(job: Job, ranking: Ranking) -> ForPage | QRecipeError:
    if ranking.partial:  # after an interrupt, don't keep the user waiting
        return planned_for_page(job, "the measurement was interrupted")
    return quantized_for_page(job)
