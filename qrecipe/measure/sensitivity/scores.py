"""How far an output is from the float one: by SQNR, or by the caller's measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from qrecipe.audit.sqnr import Totals
from qrecipe.errors.findings import ExecutionError, QRecipeError
from qrecipe.errors.text import first_line

Metric = Callable[[Any, Any], float]
"""``metric(outputs, reference)`` of one batch; higher is better."""


Effect = tuple[float | None, float | None, int]
"""The SQNR in dB or the value of the caller's measure, and the number of batches."""


class Score(Protocol):
    """Collects outputs and reference outputs of one site over batches."""

    def add(self, reference: Any, output: Any) -> None: ...

    def effect(self) -> Effect: ...


class SqnrScore:
    """The SQNR in dB over all batches together."""

    def __init__(self) -> None:
        self._batches = 0
        self._totals = Totals()

    def add(self, reference: Any, output: Any) -> None:
        self._batches += 1
        self._totals.add(reference, output)

    def effect(self) -> Effect:
        fidelity = self._totals.fidelity()
        if fidelity is None:
            raise ExecutionError.of(
                "QR422",
                "the model's output has no floating tensor to rank by",
                hint="pass your own measure as metric= or evaluate=",
            )
        return fidelity.sqnr_db, None, self._batches


class MetricScore:
    """The mean over batches of the caller's metric."""

    def __init__(self, metric: Metric) -> None:
        self._batches = 0
        self._metric = metric
        self._sum = 0.0

    def add(self, reference: Any, output: Any) -> None:
        self._sum += number(lambda: self._metric(output, reference), "metric")
        self._batches += 1

    def effect(self) -> Effect:
        return None, self._sum / self._batches, self._batches


def number(measure: Callable[[], Any], name: str) -> float:
    """The result of the caller's measure as a number. Raises ``ExecutionError`` (QR423)."""
    try:
        value = measure()
    except QRecipeError:
        raise
    except Exception as error:
        text = f"{name} failed: {type(error).__name__}: {first_line(error)}"
        raise ExecutionError.of("QR423", text) from error
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        text = f"{name} returns a {type(value).__name__}, not a number"
        hint = "return the quality of the outputs as a float; higher is better"
        raise ExecutionError.of("QR423", text, hint=hint) from None
    if math.isnan(found):
        raise ExecutionError.of("QR423", f"{name} returns NaN, which cannot be ranked")
    return found
