"""An observer that leaves the rarest values out of the range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.ao.quantization.observer import UniformQuantizationObserverBase

import qrecipe


class PercentileOptions(BaseModel, extra="forbid"):
    """The arguments that a recipe may give to ``observer = "percentile"``."""

    percentile: float = Field(default=99.9, gt=50, le=100)
    capacity: int = Field(default=2**16, ge=2**10, le=2**20)


@qrecipe.register_observer("percentile", options=PercentileOptions)
class PercentileObserver(UniformQuantizationObserverBase):
    r"""Ranges that end at a percentile of the values seen, per tensor or per channel.

    With p the ``percentile`` and Q the quantiles of the values x, an affine range is
    [Q(1 - p/100), Q(p/100)], a symmetric one [-a, a] with a = Q(p/100) of abs(x). With p = 100 that
    is the range of a min-max observer.

    The quantiles are exact for the first ``capacity`` values (of each channel). If there are
    more, a uniform random sample of that size is kept. This bounds the memory, and an outlier costs
    no resolution, as it would in a histogram. The sample's quantile is at p with a standard
    deviation of 100 * sqrt(p/100 * (1 - p/100) / capacity): 0.012 for the defaults. Every value
    gets a random priority, and those with the lowest are kept. The priorities depend only on the
    number of values before: the same data give the same range.

    Source: Wu et al., Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation, 2020 (calibration by percentile); Vitter, Random Sampling with a Reservoir, 1985.
    """

    values: Tensor
    """The kept values, (channels, kept); one row if per tensor."""
    priorities: Tensor
    """The priority of each column, (kept,)."""
    seen: Tensor
    """The number of values per row so far."""

    def __init__(
        self, percentile: float = 99.9, capacity: int = 2**16, ch_axis: int = 0, **spec: Any
    ) -> None:
        super().__init__(**spec)
        self.percentile = percentile
        self.capacity = capacity
        self.ch_axis = ch_axis
        self.register_buffer("values", torch.empty(0, 0))
        self.register_buffer("priorities", torch.empty(0))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Observes the values; returns ``x``."""
        rows = self._rows(x.detach().to(torch.float32))
        count = rows.shape[1]
        if count == 0:
            return x
        generator = torch.Generator().manual_seed(int(self.seen))
        priorities = torch.rand(count, generator=generator).to(x.device)
        self.seen += count
        if self.priorities.numel() == self.capacity:  # most values cannot be kept
            hopeful = priorities < self.priorities.max()
            rows, priorities = rows[:, hopeful], priorities[hopeful]
        if self.values.numel():
            rows = torch.cat((self.values, rows), 1)
            priorities = torch.cat((self.priorities, priorities))
        if priorities.numel() > self.capacity:
            priorities, kept = priorities.topk(self.capacity, largest=False)
            rows = rows[:, kept]
        self.values, self.priorities = rows.clone(), priorities
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Scale and zero point, (1,) per tensor and (channels,) per channel."""
        scale, zero_point = self._calculate_qparams(self.min_val, self.max_val)
        return scale, zero_point

    @property
    def min_val(self) -> Tensor:
        """The lower end of the range, as torch's observers call it; inf before any value."""
        if not self.values.numel():
            return torch.tensor(float("inf"))
        return -self.max_val if self._is_symmetric else self._quantile(1 - self.percentile / 100)

    @property
    def max_val(self) -> Tensor:
        """The upper end of the range; -inf before any value."""
        if not self.values.numel():
            return torch.tensor(float("-inf"))
        return self._quantile(self.percentile / 100)

    def reset_min_max_vals(self) -> None:
        """Forgets all values."""
        self.values, self.priorities = self.values.new_empty(0, 0), self.values.new_empty(0)
        self.seen.zero_()

    @property
    def _is_symmetric(self) -> bool:
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    @property
    def _is_per_channel(self) -> bool:
        return self.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric)

    def _rows(self, x: Tensor) -> Tensor:
        """The values as (channels, values per channel); per tensor there is one channel."""
        return x.movedim(self.ch_axis, 0).flatten(1) if self._is_per_channel else x.reshape(1, -1)

    def _quantile(self, fraction: float) -> Tensor:
        values = self.values.abs() if self._is_symmetric else self.values
        ends = torch.quantile(values, fraction, dim=1)
        return ends if self._is_per_channel else ends[0]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accepts buffers of any size: how much is kept depends on what was seen."""
        for name in ("values", "priorities"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        load: Any = super()._load_from_state_dict  # torch leaves it untyped
        load(state_dict, prefix, *args, **kwargs)
