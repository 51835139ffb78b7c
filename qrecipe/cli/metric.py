"""The user's evaluation of the float and of the quantized model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrecipe.cli.user_code import UserFunction
from qrecipe.errors.findings import QRecipeError
from qrecipe.terminal.progress import activity


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
