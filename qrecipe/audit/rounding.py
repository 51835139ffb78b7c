"""Activations rounded to the ranges of their observers, with everything else in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import MinMaxObserver, ObserverBase, innermost, is_observer
from qrecipe.audit.moving_averages import Extremes
from qrecipe.audit.sample import Sample
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.model.call import bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import map_tensors
from qrecipe.model.trace_proof import difference
from qrecipe.process.memory import raise_lack_of_memory

Ranging = Mapping[ObserverBase, ObserverBase]
"""Observers of a prepared graph, each with the one whose range is used instead."""


def rounded_db(part: fx.GraphModule, ranging: Ranging, sample: Sample) -> float:
    """The output's SQNR in dB of a prepared part whose activations are rounded.

    NaN if the output has no floating tensors.
    """
    with torch.no_grad():
        inputs = bind(part, part, sample.inputs.cloned())
        value = output_sqnr_db(sample.output, _Rounded(part, ranging).run(*inputs))
    return math.nan if value is None else value


def side_by_side_db(part: fx.GraphModule, ranging: Ranging, sample: Sample) -> float | None:
    """As `rounded_db`; None if samples change each other's results.

    Copies that are not rounded show that in the same run.
    """
    size = sample.inputs.batch_size
    if size is None:
        return None
    try:
        copies = sample.inputs.taken(torch.arange(size).repeat(2))
        with torch.no_grad():
            output = _Rounded(part, ranging, size).run(*bind(part, part, copies))
        first = map_tensors(lambda x: x[:size], output)
        last = map_tensors(lambda x: x[-size:], output)
    except Exception as error:
        raise_lack_of_memory(error)
        return None
    if difference(sample.output, first) is not None:
        return None
    value = output_sqnr_db(sample.output, last)
    return math.nan if value is None else value


def code_range(observer: ObserverBase) -> Extremes | None:
    """The range of values that kernels can represent with the scale of an observer.

    ``reduce_range`` makes the scale larger and clips nothing: kernels use all codes of the dtype.
    None if the tensor has more than one scale.
    """
    grid = _grid(observer)
    if grid is None:
        return None
    scale, zero_point, least, greatest = grid
    return scale * (least - zero_point), scale * (greatest - zero_point)


def minmax(observer: ObserverBase, seen: Extremes) -> ObserverBase:
    """The "minmax" observer that would replace ``observer``, after it has seen that range."""
    ranged = MinMaxObserver(
        dtype=observer.dtype,
        qscheme=getattr(observer, "qscheme", torch.per_tensor_affine),
        quant_min=getattr(observer, "quant_min", None),
        quant_max=getattr(observer, "quant_max", None),
    )
    ranged.min_val, ranged.max_val = map(torch.tensor, seen)
    return ranged


def _grid(observer: ObserverBase) -> tuple[float, int, int, int] | None:
    """Scale, zero point, smallest and largest code."""
    calculate_qparams: Callable[[], tuple[Tensor, Tensor]] = observer.calculate_qparams
    scale, zero_point = calculate_qparams()
    if scale.numel() != 1:
        return None
    codes = torch.iinfo(observer.dtype)
    return float(scale), int(zero_point), codes.min, codes.max


class _Rounded(Interpreter):
    """Runs a prepared graph that rounds instead of observing, but for the first ``plain`` rows."""

    def __init__(self, part: fx.GraphModule, ranging: Ranging, plain: int = 0) -> None:
        super().__init__(part)
        self._grids = {observer: _grid(ranged) for observer, ranged in ranging.items()}
        self._plain = plain

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module.get_submodule(str(target))
        if is_observer(module):
            return self._rounded(args[0], self._grids.get(innermost(module)))
        return super().call_module(target, args, kwargs)

    def _rounded(self, x: Any, grid: tuple[float, int, int, int] | None) -> Any:
        if grid is None or not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        if not self._plain:
            return torch.fake_quantize_per_tensor_affine(x, *grid)
        rounded = torch.fake_quantize_per_tensor_affine(x[self._plain :], *grid)
        return torch.cat([x[: self._plain], rounded])
