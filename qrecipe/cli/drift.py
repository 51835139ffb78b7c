"""``qrecipe drift``: check whether a stored model still fits the data."""

from __future__ import annotations

from collections.abc import Sequence

from qrecipe.artifact.loading import load_quantized
from qrecipe.cli.model_argument import get_ready, load_subject
from qrecipe.cli.output import out, out_json
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.execution.provenance import provenance
from qrecipe.measure.drift.drift import drift
from qrecipe.measure.drift.report import drift_json
from qrecipe.measure.pages.page import save_page
from qrecipe.measure.pages.reports import drift_page


def look_for_drift(
    file: str,
    model: str,
    data: str,
    *,
    threshold: float,
    max_clipped: float,
    plot: str | None,
    html: str | None,
    threads: int | None,
    plugins: Sequence[str] | None,
    as_json: bool,
) -> bool:
    """Load the model, run the data, show the report; return whether a range is off."""
    get_ready(threads, plot, html)
    with user_code(plugins) as code, user_output():
        batches = code.function(data, "--data")
        converted = load_quantized(file, load_subject(code, model).model)
        report = drift(converted, batches())
    # show the result before anything is written, which could fail
    drifted = report.drifted(threshold, max_clipped=max_clipped)
    if as_json:
        above = [{"name": site.name, "tensor": site.tensor} for site in drifted]
        thresholds = {"threshold": threshold, "max_clipped": max_clipped}
        out_json({**drift_json(report), **thresholds, "drifted": above})
    else:
        out(report.text(threshold, max_clipped=max_clipped))
    if plot is not None:
        report.plot(plot)
    if html is not None:
        page = drift_page(report, provenance(converted), threshold, max_clipped=max_clipped)
        save_page(page, html)
    return bool(drifted)
