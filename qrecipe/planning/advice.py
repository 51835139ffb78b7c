"""Warnings about what is known to be slower in int8 than in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qrecipe.errors.findings import Finding
from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.backend import Outcome
from qrecipe.planning.engines import is_slow
from qrecipe.recipe.schema import Backend
from qrecipe.rules.resolution import Decision, listed

_TINY_MODEL = 10_000
"""With fewer weights, quantizing and dequantizing may cost more than the kernels save."""


def advice(
    inventory: Inventory,
    decisions: Mapping[str, Decision],
    outcome_of: Mapping[str, Outcome],
    backend: Backend,
) -> Iterator[Finding]:
    """Warnings about the speed of the quantized model (QR207, QR208)."""
    static = {name: outcome for name, outcome in outcome_of.items() if outcome.mode == "static"}
    slow = [
        name
        for name, outcome in static.items()
        if outcome.qconfig is not None
        and is_slow(inventory.matches[name], backend, outcome.qconfig.weight, outcome.engine)
    ]
    if slow:
        yield Finding(
            "QR207",
            f"convolution in small groups, 2 to 200 times slower in int8 than in float: "
            f"{listed(slow)}",
            decisions[slow[0]].rule.location,
            hint="leave them float; modules that are not transposed have a fast kernel on onednn, "
            "which needs symmetric weights",
        )
    if any(_weight_count(inventory.matches[name]) for name in static):
        quantized = [name for name, outcome in outcome_of.items() if outcome.mode is not None]
        weights = sum(_weight_count(inventory.matches[name]) for name in quantized)
        if weights < _TINY_MODEL:
            yield Finding(
                "QR208",
                f"the quantized sites only have {weights} weights: "
                "such a small model can be slower in int8",
                hint="measure: qrecipe quantize prints the latency of both",
            )


def _weight_count(match: Match) -> int:
    """The number of weights in matrices and kernels, including recurrent layers, without biases."""
    parameters = () if match.module is None else match.module.parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
