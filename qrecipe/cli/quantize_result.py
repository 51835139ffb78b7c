"""The result of ``qrecipe quantize`` as a table and as JSON."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from qrecipe.audit.moving_averages import MANY_BATCHES, weight_text
from qrecipe.audit.sqnr import sqnr_text
from qrecipe.errors.text import counted
from qrecipe.measure.latency import Latency
from qrecipe.terminal.tables import render_table


@dataclass(frozen=True, slots=True)
class Metric:
    """The results of the user's evaluation."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The number of batches, the weight of the first in moving averages, and the clipping."""

    batches: int
    first_weight: float | None
    clipping: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """Float and quantized model side by side; sizes in bytes, the SQNR of the output in dB."""

    metric: Metric | None
    float_size: int
    quantized_size: int
    latency: Latency
    sqnr_db: float | None
    inputs: str
    calibrated: Calibrated | None


def result_text(result: Result) -> str:
    """A table of what changed, and the conditions of the measurement."""
    latency = result.latency
    rows = [
        *([] if result.metric is None else [_metric_row(result.metric)]),
        (
            "tensors",
            _kilobytes(result.float_size),
            _kilobytes(result.quantized_size),
            f"{result.float_size / max(1, result.quantized_size):.2f} times smaller",
        ),
        (
            "latency",
            f"{latency.reference * 1000:.2f} ms",
            f"{latency.candidate * 1000:.2f} ms",
            f"float/quantized = {latency.ratio:.2f}",
        ),
        ("output", "", "", sqnr_text(result.sqnr_db)),
    ]
    note = (
        f"Latency and SQNR on the first batch ({result.inputs}); latency is the median of "
        f"{latency.runs} interleaved runs with {counted(latency.threads, 'thread')}. Float is the "
        "eager model. Size counts parameters, buffers, and packed weights with their scales."
    )
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    notes = [note, *([] if result.calibrated is None else [_calibrated(result.calibrated)])]
    table = render_table(("", "float", "quantized", ""), rows)
    return "\n\n".join([table, *(textwrap.fill(each, width) for each in notes)])


def _calibrated(calibrated: Calibrated) -> str:
    text = f"Calibrated on {counted(calibrated.batches, 'batch')}"
    if calibrated.first_weight is not None and calibrated.batches < MANY_BATCHES:
        text += weight_text(calibrated.first_weight)
    return f"{text}." if calibrated.clipping is None else f"{text}: {calibrated.clipping}."


def _metric_row(metric: Metric) -> tuple[str, str, str, str]:
    change = metric.after - metric.before
    return (metric.name, f"{metric.before:.6g}", f"{metric.after:.6g}", f"{change:+.4g}")


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f} kB"


def result_json(result: Result) -> dict[str, Any]:
    """The result as plain values."""
    latency, metric = result.latency, result.metric
    return {
        "metric": None
        if metric is None
        else {"name": metric.name, "float": metric.before, "quantized": metric.after},
        "tensor_bytes": {"float": result.float_size, "quantized": result.quantized_size},
        "latency": {
            "float_seconds": latency.reference,
            "quantized_seconds": latency.candidate,
            "ratio": latency.ratio,
            "runs": latency.runs,
            "threads": latency.threads,
        },
        "output_sqnr_db": result.sqnr_db,
        "calibration": None if result.calibrated is None else asdict(result.calibrated),
    }
