"""The distribution of values over all batches, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qrecipe.audit.sqnr import energy_ratio_db
from qrecipe.errors.short import ShortRepr
from qrecipe.observers.histogram import DoublingHistogram

_POINTS = 8


@dataclass(frozen=True, slots=True, repr=False)
class Histogram(ShortRepr):
    """Counts of values in bins of equal width from ``low`` to ``high``."""

    low: float
    high: float
    counts: tuple[int, ...]


class Distribution:
    """The counts of a `DoublingHistogram`, and the extremes."""

    def __init__(self) -> None:
        self.least = math.inf
        self.greatest = -math.inf
        self._bins = DoublingHistogram()
        self._unbounded = 0

    @property
    def is_finite(self) -> bool:
        """Whether no value was infinite or NaN."""
        return not self._unbounded

    def add(self, values: Tensor) -> None:
        """Count the finite values of a tensor."""
        if not values.numel():
            return
        least, greatest = (float(end) for end in torch.aminmax(values))
        if not (math.isfinite(least) and math.isfinite(greatest)):
            finite = values[torch.isfinite(values)]
            self._unbounded += values.numel() - finite.numel()
            if finite.numel():
                self.add(finite)
            return
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        self._bins.add(values, least, greatest)

    def merge(self, other: Distribution) -> None:
        """Add what another one has counted."""
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        self._unbounded += other._unbounded
        self._bins.merge(other._bins)

    def histogram(self, bins: int = 96) -> Histogram | None:
        """A coarser count from the smallest to the largest value; None without values."""
        if not math.isfinite(self.least):
            return None
        low, high = self.least, self.greatest
        if low == high:
            return Histogram(low, high, (int(self._bins.counts.sum()),))
        index = ((self._bins.centers() - low) / (high - low) * bins).long().clamp(0, bins - 1)
        counts = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, self._bins.counts)
        return Histogram(low, high, tuple(int(count) for count in counts))

    def sqnr_db(self, rounded: Callable[[Tensor], Tensor]) -> float | None:
        """The estimated SQNR of ``rounded``, with the values of a bin spread evenly.

        None if there are no values, only zeros, or values that are not finite.
        """
        if not (self._bins.width and self.is_finite):
            return None
        values, counts = self._points()
        noise = float((counts * (values - rounded(values)) ** 2).sum())
        signal = float((counts * values**2).sum())
        if not noise or not signal:
            return None
        return energy_ratio_db(signal, noise)

    def share(self, chosen: Callable[[Tensor], Tensor]) -> float:
        """The estimated share of finite values for which ``chosen`` is true."""
        values, counts = self._points()
        return float((counts * chosen(values)).sum()) / max(1.0, float(self._bins.counts.sum()))

    def _points(self) -> tuple[Tensor, Tensor]:
        """Values that represent those counted, and how many each stands for."""
        used = self._bins.counts > 0
        offsets = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS - 0.5
        values = self._bins.centers()[used, None] + offsets * self._bins.width
        # zeros, frequent after ReLU, must not be spread over their bin as small values
        values = torch.where(values.abs() < self._bins.width, torch.zeros_like(values), values)
        return values, self._bins.counts[used, None] / _POINTS
