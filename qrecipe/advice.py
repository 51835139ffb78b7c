"""What is legal and planned, but known to be slower in int8 than in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from qrecipe.backend import Outcome
from qrecipe.errors import Finding
from qrecipe.inventory import Inventory, Match
from qrecipe.rules import Decision, listed
from qrecipe.schema import Backend

_TINY_MODEL = 10_000
"""Weights below which quantizing and dequantizing cost more than the kernels save."""


def advice(
    inventory: Inventory,
    decisions: Mapping[str, Decision],
    outcome_of: Mapping[str, Outcome],
    backend: Backend,
) -> Iterator[Finding]:
    """Warnings about the speed of what would be quantized (QR207, QR208)."""
    static = [
        inventory.matches[name] for name, outcome in outcome_of.items() if outcome.mode == "static"
    ]
    slow = [match.operation.name for match in static if _is_slow_depthwise(match, backend)]
    if slow:
        yield Finding(
            "QR207",
            f"the int8 depthwise convolution is 40 to 200 times slower than float at {listed(slow)}",
            decisions[slow[0]].rule.location,
            hint="only padding = kernel_size // 2 has a fast kernel: pad so, or leave them float",
        )
    weights = sum(_weight_count(match) for match in static)
    if 0 < weights < _TINY_MODEL:
        yield Finding(
            "QR208",
            f"all that is quantized has {weights} weights; so small a model can be slower in int8",
            hint="measure: qrecipe quantize prints the latency of both",
        )


def _is_slow_depthwise(match: Match, backend: Backend) -> bool:
    module = match.module
    if backend == "qnnpack" or not isinstance(module, (nn.Conv2d, nn.Conv3d)):
        return False
    depthwise = module.groups == module.in_channels > 1
    return depthwise and module.padding != tuple(size // 2 for size in module.kernel_size)


def _weight_count(match: Match) -> int:
    weight = getattr(match.module, "weight", None)
    return 0 if weight is None or weight.dim() < 2 else weight.numel()
