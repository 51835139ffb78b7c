"""``qrecipe drift``: check whether a stored model still fits the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qrecipe.artifact.loading import load_quantized
from qrecipe.cli.model_argument import load_subject
from qrecipe.cli.output import out, out_json
from qrecipe.cli.progress import bar
from qrecipe.cli.quantize import hints_for_command_line
from qrecipe.cli.user_code import UserCode, user_output
from qrecipe.execution.provenance import provenance
from qrecipe.measure.drift.drift import drift
from qrecipe.measure.drift.report import drift_json
from qrecipe.measure.pages.page import check_writable, save_page
from qrecipe.measure.pages.plots import check_available
from qrecipe.measure.pages.reports import drift_page


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; ``plot`` and ``html`` are files to write."""

    file: str
    model: str
    data: str
    threshold: float
    max_clipped: float
    plugins: Sequence[str]
    threads: int | None
    plot: str | None
    html: str | None


def look_for_drift(request: Request, *, as_json: bool) -> bool:
    """Load the model, run the data, show the report; return whether a range is off."""
    if request.plot is not None or request.html is not None:
        check_available()
    if request.html is not None:
        check_writable(request.html)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with UserCode() as code, user_output(), hints_for_command_line():
        code.import_plugins(request.plugins)
        data = code.function(request.data, "--data")
        subject = load_subject(code, request.model, ())
        converted = load_quantized(request.file, subject.model)
        with bar("measuring drift") as show:
            report = drift(converted, data(), progress=show)
    # show the result before anything is written, which could fail
    threshold, max_clipped = request.threshold, request.max_clipped
    drifted = report.drifted(threshold, max_clipped=max_clipped)
    if as_json:
        above = [{"name": site.name, "tensor": site.tensor} for site in drifted]
        thresholds = {"threshold": threshold, "max_clipped": max_clipped}
        out_json({**drift_json(report), **thresholds, "drifted": above})
    else:
        out(report.text(threshold, max_clipped=max_clipped))
    if request.plot is not None:
        report.plot(request.plot)
    if request.html is not None:
        page = drift_page(report, provenance(converted), threshold, max_clipped=max_clipped)
        save_page(page, request.html)
    return bool(drifted)
