"""Whether a range that was observed between limits gives the integers that it should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.errors.findings import Finding
from qrecipe.model.addresses import observed_name
from qrecipe.planning.plan import Limits

_STEPS_BEYOND = 64
_POINTS_A_STEP = 4


class Clamping:
    """What shows its observer a tensor between limits."""

    limits: Limits
    dtype: torch.dtype


def clamp_findings(prepared: fx.GraphModule) -> Iterator[Finding]:
    """Ranges between limits whose integers depend on whether the clamp comes first (QR412).

    They are compared on a grid of four points for each integer of the dtype, with 64 steps beyond
    its ends, for the scale and zero point that will be stored.
    """
    for node in prepared.graph.nodes:
        observer: Any = prepared.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(observer, Clamping):
            continue
        scale, zero_point = observer.calculate_qparams()  # type: ignore[attr-defined]
        if commutes(float(scale), int(zero_point), observer.dtype, observer.limits):
            continue
        yield Finding(
            "QR412",
            f"the integers of {observed_name(node)} are others before its clamp than after it",
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
