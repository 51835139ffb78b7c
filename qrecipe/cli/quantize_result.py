"""The result of ``qrecipe quantize``: measured, and as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrecipe.audit.moving_averages import MANY_BATCHES, weight_text
from qrecipe.audit.ranges import observes
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_text
from qrecipe.cli.user_code import UserFunction
from qrecipe.errors.findings import QRecipeError
from qrecipe.errors.text import counted
from qrecipe.execution.batches import describe_batch
from qrecipe.execution.calibration import order_finding
from qrecipe.execution.prepared import PreparedState, prepared_state
from qrecipe.execution.provenance import provenance, stored_plan
from qrecipe.measure.sizes import model_size
from qrecipe.measure.turns import Latency, Speed, compare_latency
from qrecipe.model.call import Inputs
from qrecipe.planning.faster_runtime import faster_runtime
from qrecipe.terminal.progress import activity
from qrecipe.terminal.report import Result, Section, Table, Text


@dataclass(frozen=True, slots=True)
class Metric:
    """The results of the user's evaluation."""

    name: str
    before: float
    after: float

    @classmethod
    def of(cls, evaluate: UserFunction, model: nn.Module, converted: nn.Module) -> Metric:
        """Evaluate both. Raises QRecipeError (QR601) if that gives no number."""
        with torch.no_grad(), activity("evaluating"):
            return cls(evaluate.name, _number(evaluate, model), _number(evaluate, converted))

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Name, float, quantized and the change, as text."""
        change = f"{self.after - self.before:+.4g}"
        return self.name, f"{self.before:.6g}", f"{self.after:.6g}", change

    @property
    def change(self) -> str:
        """The same on one line without the name: ``0.986 in float, 0.984 quantized (-0.002)``."""
        _, before, after, change = self.row
        return f"{before} in float, {after} quantized ({change})"

    def to_json(self) -> dict[str, Any]:
        """The results as plain values."""
        return {"name": self.name, "float": self.before, "quantized": self.after}


def _number(evaluate: UserFunction, model: nn.Module) -> float:
    value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        text = f"{evaluate.name}() returns a {type(value).__name__}, not a number"
        hint = "return the metric of the given model as a float"
        raise QRecipeError.of("QR601", text, hint=hint) from None


@dataclass(frozen=True, slots=True, repr=False)
class Measured(Result):
    """Float and quantized model side by side; sizes in bytes, the SQNR of the output in dB.

    ``advice`` is about the batches, ``faster`` about another runtime.
    """

    metric: Metric | None
    float_size: int
    quantized_size: int
    latency: Latency
    sqnr_db: float | None
    inputs: str
    calibration: dict[str, Any] | None
    advice: str | None
    faster: str | None

    def _sections(self) -> Iterator[Section]:
        latency = self.latency
        rows = [
            (
                "tensors",
                _kilobytes(self.float_size),
                _kilobytes(self.quantized_size),
                f"{self.float_size / max(1, self.quantized_size):.2f} times smaller",
            ),
            (
                "latency",
                _milliseconds(latency.reference, latency.reference_spread),
                _milliseconds(latency.candidate, latency.candidate_spread),
                _speed(latency.speed),
            ),
            ("output", "", "", sqnr_text(self.sqnr_db)),
        ]
        if self.metric is not None:
            rows.insert(0, self.metric.row)
        yield Table("Result", ("", "float", "quantized", ""), rows)
        yield Text("Conditions", [self._conditions])
        if self.calibration is not None:
            yield Text("Calibration", [_calibrated(**self.calibration)])
        for note in filter(None, (self.advice, self.faster and f"{self.faster}.")):
            yield Text("Advice", [note])

    @property
    def _conditions(self) -> str:
        threads = counted(self.latency.threads, "thread")
        return (
            f"Latency and SQNR on the first batch ({self.inputs}); latency is the median of "
            f"{self.latency.runs} interleaved runs with {threads}, ± half the distance between the "
            "quartiles. Float is the eager model. Size counts parameters, buffers, and packed "
            "weights with their scales."
        )

    def _document(self) -> dict[str, Any]:
        latency = self.latency
        return {
            "metric": self.metric,
            "tensor_bytes": {"float": self.float_size, "quantized": self.quantized_size},
            "latency": {
                "float_seconds": latency.reference,
                "quantized_seconds": latency.candidate,
                "float_spread_seconds": latency.reference_spread,
                "quantized_spread_seconds": latency.candidate_spread,
                "ratio": latency.speed.median,
                "interval": [latency.speed.low, latency.speed.high],
                "is_slower": latency.speed.is_slower,
                "runs": latency.runs,
                "threads": latency.threads,
            },
            "output_sqnr_db": self.sqnr_db,
            "calibration": self.calibration,
        }


def measure(
    model: nn.Module,
    converted: nn.Module,
    first: Any,
    evaluate: UserFunction | None,
    prepared: nn.Module,
) -> Measured:
    """Compare both models on the first batch, and by the user's evaluation if there is one."""
    inputs, state = Inputs.from_batch(first), prepared_state(prepared)
    calibration = {
        "batches": state.batches,
        "first_weight": state.first_weight,
        "clipping": state.clipping,
    }
    with torch.no_grad():
        return Measured(
            metric=None if evaluate is None else Metric.of(evaluate, model, converted),
            float_size=model_size(model),
            quantized_size=model_size(converted),
            latency=compare_latency(model, converted, inputs),
            sqnr_db=output_sqnr_db(inputs.call(model), inputs.call(converted)),
            inputs=describe_batch(first),
            calibration=calibration if state.batches and observes(prepared) else None,
            advice=_advice(state),
            faster=_faster(converted) if observes(prepared) else None,
        )


def _advice(state: PreparedState) -> str | None:
    """What the finding about the weight of the first batch says to do, unless it is accepted."""
    finding = order_finding(state)
    if finding is None or finding.code in state.lint.ignore:
        return None
    return f"{finding.code}: {finding.hint}."


def _faster(converted: nn.Module) -> str | None:
    plan = stored_plan(provenance(converted))
    return faster_runtime(has_convolutions=any("conv" in site.op.lower() for site in plan))


_SLOWER = ", slower: use qrecipe fastest"


def _calibrated(batches: int, first_weight: float | None, clipping: str | None) -> str:
    text = f"Calibrated on {counted(batches, 'batch')}"
    if first_weight is not None and batches < MANY_BATCHES:
        text += weight_text(first_weight)
    return f"{text}." if clipping is None else f"{text}: {clipping}."


def _milliseconds(seconds: float, spread: float) -> str:
    return f"{seconds * 1000:.2f} ± {spread * 1000:.2f} ms"


def _speed(speed: Speed) -> str:
    """The ratio, unless noise is larger than the difference."""
    if speed.is_faster:
        return f"float/quantized = {speed.text}"
    return f"float/quantized = {speed.text}{_SLOWER}" if speed.is_slower else speed.text


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f} kB"
