"""Ranges that are observed between limits, and whether they give the integers that they should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, StandIn
from qrecipe.errors.findings import Finding
from qrecipe.model.addresses import observed_name
from qrecipe.model.nodes import called_modules
from qrecipe.planning.plan import Limits

_STEPS_BEYOND = 64
_POINTS_A_STEP = 4


class Clamped(ObserverBase, StandIn):
    """Shows an observer what is left of a tensor between limits, and returns the whole.

    A fake-quant rounds what is left: nothing reads the rest, so no gradient comes from there.
    """

    def __init__(self, observer: Any, limits: Limits) -> None:
        super().__init__(observer.dtype, bool(getattr(observer, "is_dynamic", False)))
        self.activation_post_process = observer
        self.limits = limits
        self.take_settings(observer)

    def forward(self, x: Tensor) -> Any:
        observed = self.activation_post_process(x.clamp(*self.limits))
        return observed if isinstance(self.activation_post_process, FakeQuantizeBase) else x

    def calculate_qparams(self, **_: Any) -> Any:
        return self.activation_post_process.calculate_qparams()


def clamp_findings(prepared: fx.GraphModule) -> Iterator[Finding]:
    """Ranges between limits whose integers depend on whether the clamp comes first (QR412).

    They are compared on a grid of four points for each integer of the dtype, with 64 steps beyond
    its ends, for the scale and zero point that will be stored.
    """
    for node, module in called_modules(prepared.graph):
        for observer in module.modules():
            if not isinstance(observer, Clamped):
                continue
            scale, zero_point = observer.calculate_qparams()
            if not commutes(float(scale), int(zero_point), observer.dtype, observer.limits):
                yield Finding(
                    "QR412",
                    f"the integers of {observed_name(node)} differ before and after its clamp",
                    hint="leave the clamp float, and report the model",
                )


def commutes(scale: float, zero_point: int, dtype: torch.dtype, limits: Limits) -> bool:
    """Whether rounding, clamping and rounding again gives what clamping and rounding gives."""
    codes = torch.iinfo(dtype)

    def rounded(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, codes.min, codes.max)

    low, high = codes.min - zero_point - _STEPS_BEYOND, codes.max - zero_point + _STEPS_BEYOND
    grid = torch.linspace(low, high, (high - low) * _POINTS_A_STEP + 1) * scale
    ends = [end for end in limits if end is not None and math.isfinite(end)]
    grid = torch.cat([grid, torch.tensor(ends, dtype=torch.float32)])
    first, last = rounded(grid.clamp(*limits)), rounded(rounded(grid).clamp(*limits))
    return bool(torch.equal(first, last))
