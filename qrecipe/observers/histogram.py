"""A histogram around zero in constant memory, whatever range its values have."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

BINS = 8192

_NEAR_OVERFLOW = 1e37


class DoublingHistogram(nn.Module):
    """Counts of finite values in bins that double in width when a value is outside.

    Merging is exact: each bin of the wider range is two of the narrower one. ``counts`` [8192] is
    float64, from ``-limit`` to ``limit``.
    """

    counts: Tensor
    limit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("limit", torch.zeros((), dtype=torch.float64))

    @property
    def width(self) -> float:
        """The width of one bin."""
        return 2 * float(self.limit) / BINS

    def centers(self) -> Tensor:
        """The middle of each bin. [8192]"""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width - float(self.limit)

    def add(self, values: Tensor, least: float, greatest: float) -> None:
        """Count finite values, which have these extremes."""
        self._widen(max(-least, greatest))
        limit = float(self.limit)
        if limit:
            wide = values.double() if limit > _NEAR_OVERFLOW else values.float()
            self.counts += torch.histc(wide, BINS, -limit, limit).double()
        else:
            self.counts[BINS // 2] += values.numel()

    def merge(self, other: DoublingHistogram) -> None:
        """Add what another one has counted."""
        self._widen(float(other.limit))
        other = copy.deepcopy(other)
        other._widen(float(self.limit))
        self.counts += other.counts

    def _widen(self, extreme: float) -> None:
        limit = float(self.limit)
        if extreme == 0 or extreme <= limit:
            return
        if not limit:
            self.limit.fill_(max(2.0 ** math.ceil(math.log2(extreme)), extreme))
            return
        while limit < extreme:
            quarter = BINS // 4
            merged = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()
            self.counts[quarter : quarter + BINS // 2] = merged
            limit *= 2
        self.limit.fill_(limit)
