"""How observers on several ranks come to what one observer of all batches finds.

Most of torch's observers only depend on the extremes of a tensor: they are shown the extremes of
every rank's calls. A histogram also needs counts, in the bins that the observer has at the time of
the call. An observer with a method ``merge`` merges the other ranks' observers into itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qrecipe._torch_ao import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsObserver,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    _LearnableFakeQuantize,
)
from qrecipe.observers.activations import MeanMinMaxObserver

Merging = Literal["extremes", "histogram", "merge", "nothing"]

# a subclass that observes as its base does is merged as its base
_AVERAGING = {MovingAverageMinMaxObserver.forward, MovingAveragePerChannelMinMaxObserver.forward}
_BY_EXTREMES = {
    *_AVERAGING,
    MinMaxObserver.forward,
    PerChannelMinMaxObserver.forward,
    MeanMinMaxObserver.forward,
}
_WITHOUT_STATE = {FixedQParamsObserver.forward, PlaceholderObserver.forward}
_FAKE_QUANTS = {
    FakeQuantize.forward,
    FusedMovingAvgObsFakeQuantize.forward,
    _LearnableFakeQuantize.forward,
}

Span = tuple[Tensor, Tensor]
"""The lowest and the highest value."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """An observer, alone or in the fake-quant ``owner`` that is called; ``show`` calls it."""

    name: str
    owner: Any
    observer: Any
    show: Callable[[Tensor], object]

    @property
    def merging(self) -> Merging | None:
        """How it is merged; None if it does not say."""
        if hasattr(self.owner, "merge") or hasattr(self.observer, "merge"):
            return "merge"
        if isinstance(self.owner, FakeQuantizeBase) and _observing(self.owner) not in _FAKE_QUANTS:
            return None
        observing = _observing(self.observer)
        if observing is HistogramObserver.forward:
            return "histogram"
        if observing in _WITHOUT_STATE:
            return "nothing"
        return "extremes" if observing in _BY_EXTREMES else None

    @property
    def is_averaging(self) -> bool:
        """Whether the order of the batches counts."""
        return _observing(self.observer) in _AVERAGING

    def summary(self, x: Tensor) -> Tensor | None:
        """What of ``x`` has to be known besides counts: extremes [2], of channels like ``x``.

        None where there is nothing to observe.
        """
        x = x.detach()
        if self.merging == "histogram" and x.numel():
            x = counted(x)
        if not x.numel():
            return None
        if not isinstance(self.observer, PerChannelMinMaxObserver):
            return torch.stack(torch.aminmax(x))
        others = [axis for axis in range(x.dim()) if axis != self.observer.ch_axis % x.dim()]
        if not others:
            return x.clone()
        ends = x.amin(others, keepdim=True), x.amax(others, keepdim=True)
        return torch.cat(ends, dim=others[0])

    def take(self, states: Sequence[dict[str, Any]]) -> None:
        """Merge with the states of all ranks' observers, this one's among them."""
        merging = self.owner if hasattr(self.owner, "merge") else self.observer
        first, *others = (_revived(merging, state) for state in states)
        first.merge(others)
        vars(merging).update(state_of(first))
        self.refresh()

    def state(self) -> dict[str, Any]:
        """What `take` needs of an observer with a method ``merge``."""
        return state_of(self.owner if hasattr(self.owner, "merge") else self.observer)

    def refresh(self) -> None:
        """Let a fake-quant compute its scale from what its observer has."""
        if self.owner is not self.observer:
            with shown_to(self.observer, lambda x: None):
                self.owner(torch.zeros(1))


@contextmanager
def shown_to(module: nn.Module, instead: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside a ``with``, ``instead`` is called for each tensor that a module would observe."""

    def forward(x: Tensor) -> Tensor:
        instead(x)
        return x

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


def counted(x: Tensor) -> Tensor:
    """The values that torch's histogram counts: infinities are left out."""
    x = x.detach()
    low, high = torch.aminmax(x)
    return x[x.abs() != torch.inf] if low == -torch.inf or high == torch.inf else x


def spans(observer: Any, extremes: Sequence[Span]) -> Iterator[Span]:
    """The range of a histogram after each call, from the extremes of the calls in order."""
    span = None if _is_new(observer) else (observer.min_val, observer.max_val)
    dtype = observer.min_val.dtype
    for low, high in ((low.to(dtype), high.to(dtype)) for low, high in extremes):
        span = (low, high) if span is None else (torch.min(span[0], low), torch.max(span[1], high))
        yield span


def add_counts(observer: Any, counts: Tensor, span: Span) -> None:
    """Do what torch's histogram does with a call that has these counts in this range."""
    low, high = span
    before = observer.min_val.clone(), observer.max_val.clone()
    if _is_new(observer):
        merged = counts
    elif before == span:
        merged = observer.histogram + counts
    else:
        merged = observer._combine_histograms(observer.histogram, *before, counts, low, high)
    observer.histogram.copy_(merged)
    observer.min_val.copy_(low)
    observer.max_val.copy_(high)


def state_of(observer: nn.Module) -> dict[str, Any]:
    """The attributes of an observer, without hooks."""
    return {name: value for name, value in vars(observer).items() if "_hooks" not in name}


def _revived(like: nn.Module, state: dict[str, Any]) -> Any:
    """An observer of the same class in another state."""
    made = object.__new__(type(like))
    made.__dict__.update(vars(like) | state)
    return made


def _observing(module: object) -> object:
    return getattr(type(module), "forward", None)


def _is_new(observer: Any) -> bool:
    return bool(observer.min_val == torch.inf) or bool(observer.max_val == -torch.inf)
