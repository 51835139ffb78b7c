"""The only import of the public part of ``torch.ao``: names and the warning filter.

Nothing is filtered for the whole process: calls that would repeat torch's deprecation notices run
inside `quiet`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
)
from torch.ao.quantization.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    UniformQuantizationObserverBase,
)
from torch.ao.quantization.qconfig import QConfig

from qrecipe._torch_versions import warn_if_untested
from qrecipe.process.warnings import Notice, held_back

_NOTICES: tuple[Notice, ...] = (
    (r"torch\.ao\.quantization is deprecated", DeprecationWarning),
    (r"Please use quant_min and quant_max to specify the range", UserWarning),
    (r"To copy construct from a tensor", UserWarning),
    (r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other", UserWarning),
)
"""What torch says about its own future at every call; the user can do nothing about it."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back torch's notices of deprecation, and no other warning, inside a ``with``."""
    with held_back(_NOTICES):
        yield


class StandIn:
    """A base of classes that stand in a graph for an observer of torch.ao."""

    def take_settings(self, observer: Any) -> None:
        """Have the settings of an observer, as far as it has them."""
        for setting in ("qscheme", "quant_min", "quant_max", "ch_axis", "eps"):
            if hasattr(observer, setting):
                setattr(self, setting, getattr(observer, setting))


def is_observer(module: object) -> bool:
    """Whether a module observes a tensor, and in training rounds it as well."""
    return isinstance(module, (ObserverBase, FakeQuantizeBase, StandIn))


def innermost(observer: Any) -> Any:
    """The observer in a fake-quant, or in what stands for either; any other module itself."""
    while hasattr(observer, "activation_post_process"):
        observer = observer.activation_post_process
    return observer


def named_class(target: str) -> type[Any]:
    """The class of that dotted name, from the table of `signatures` and never from a recipe."""
    module, _, name = target.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


warn_if_untested(torch.__version__)
