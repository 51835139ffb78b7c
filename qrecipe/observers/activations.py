"""Observers of activations that torch lacks: a mean of extremes, and least squared error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qrecipe._torch_ao import MinMaxObserver, UniformQuantizationObserverBase
from qrecipe.observers.histogram import DoublingHistogram

_SHRINKS = 40
_NARROWEST = 0.1
_SINGLE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)


class MeanMinMaxObserver(MinMaxObserver):
    """The mean of the extremes of all batches, each with the same weight.

    Unlike a moving average it does not depend on the order of the batches. It clips what exceeds
    the mean.
    """

    batches: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe a batch, and return it."""
        if x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach().to(self.min_val.dtype)
        self.batches += 1
        for kept, seen in zip((self.min_val, self.max_val), torch.aminmax(x), strict=True):
            first = bool(self.batches == 1)
            kept.copy_(seen if first else kept + (seen - kept) / self.batches)
        return x_orig

    @torch.jit.export
    def reset_min_max_vals(self) -> None:
        """Forget all batches."""
        super().reset_min_max_vals()
        self.batches.zero_()


class MSEObserver(UniformQuantizationObserverBase):
    """The range with the least squared error over everything that was observed.

    A histogram of 8,192 bins is searched: 40 ranges that are narrower on both sides by the same
    factor, then each end by itself. One range for a tensor.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise NotImplementedError("mse finds one range for a tensor: use a per-tensor qscheme")
        self.histogram = DoublingHistogram()
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))
        self._searched: tuple[float, tuple[float, float]] | None = None

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe a batch, and return it. NaN and infinity leave no range."""
        if x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach()
        least, greatest = torch.aminmax(x)
        if not bool(torch.isfinite(least) & torch.isfinite(greatest)):
            self.min_val.fill_(torch.nan)
            self.max_val.fill_(torch.nan)
            return x_orig
        self.histogram.add(x, float(least), float(greatest))
        self.min_val.copy_(torch.minimum(self.min_val, least))
        self.max_val.copy_(torch.maximum(self.max_val, greatest))
        return x_orig

    def merge(self, others: Sequence[MSEObserver]) -> None:
        """Add what other observers have seen."""
        for other in others:
            self.histogram.merge(other.histogram)
            self.min_val.copy_(torch.minimum(self.min_val, other.min_val))
            self.max_val.copy_(torch.maximum(self.max_val, other.max_val))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale [1] and zero point [1] of the range with the least squared error."""
        found: tuple[Tensor, Tensor]
        if not bool(torch.isfinite(self.min_val)):
            found = self._calculate_qparams(self.min_val, self.max_val)
            return found
        count = float(self.histogram.counts.sum())
        if self._searched is None or self._searched[0] != count:
            self._searched = count, self._least_error()
        low, high = map(torch.tensor, self._searched[1])
        found = self._calculate_qparams(low, high)
        return found

    def _least_error(self) -> tuple[float, float]:
        used = self.histogram.counts > 0
        points, counts = self.histogram.centers()[used], self.histogram.counts[used]
        low, high = float(self.min_val.clamp(max=0)), float(self.max_val.clamp(min=0))

        def error(ends: tuple[float, float]) -> float:
            scale, zero_point = self._calculate_qparams(*map(torch.tensor, ends))
            step, zero = float(scale), float(zero_point)
            codes = torch.clamp(torch.round(points / step) + zero, self.quant_min, self.quant_max)
            return float((counts * ((codes - zero) * step - points) ** 2).sum())

        shrinks = (1 - (1 - _NARROWEST) * index / _SHRINKS for index in range(_SHRINKS))
        best = min(((low * by, high * by) for by in shrinks), key=error)
        for _ in range(2):
            best = min((best, *((max(low, best[0] * by), best[1]) for by in _SINGLE)), key=error)
            best = min((best, *((best[0], min(high, best[1] * by)) for by in _SINGLE)), key=error)
        return best

    def extra_repr(self) -> str:
        """The extremes."""
        return f"min_val={self.min_val}, max_val={self.max_val}"
