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


Part = Totals | float
"""What one call of the model adds to the score of a site: sums, or the caller's metric."""


class Score(Protocol):
    """Collects the parts of one site over the calls of all batches.

    In the order of the calls, the effect is the same to the bit, whoever computed the parts.
    """

    def part(self, reference: Any, output: Any) -> Part: ...

    def add(self, part: Any) -> None: ...

    def effect(self) -> Effect: ...


class SqnrScore:
    """The SQNR in dB over all batches together."""

    def __init__(self) -> None:
        self._batches = 0
        self._totals = Totals()

    def part(self, reference: Any, output: Any) -> Totals:
        totals = Totals()
        totals.add(reference, output)
        return totals

    def add(self, part: Totals) -> None:
        self._batches += 1
        self._totals.merge(part)

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

    def part(self, reference: Any, output: Any) -> float:
        return number(lambda: self._metric(output, reference), "metric")

    def add(self, part: float) -> None:
        self._sum += part
        self._batches += 1

    def effect(self) -> Effect:
        return None, self._sum / self._batches, self._batches


def new_score(metric: Metric | None) -> Score:
    """By the caller's metric, or by SQNR."""
    return SqnrScore() if metric is None else MetricScore(metric)


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
