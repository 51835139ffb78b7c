"""Activations rounded to the ranges of their observers, with everything else in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import MinMaxObserver, ObserverBase, is_observer
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


def rounded_dbs(
    part: fx.GraphModule, rangings: Sequence[Ranging], sample: Sample, are_apart: bool
) -> list[float] | None:
    """`rounded_db` with several ranges, from one run of copies of the samples.

    None if samples do not stay apart. If that is not known, copies that are not rounded show it.
    """
    size, plain = sample.inputs.batch_size, 0 if are_apart else 1
    if size is None:
        return None
    count = plain + len(rangings)
    try:
        copies = sample.inputs.taken(torch.arange(size).repeat(count))
        with torch.no_grad():
            running = _SideBySide(part, rangings, size, plain * size)
            output = running.run(*bind(part, part, copies))
        outputs = [
            map_tensors(lambda x, at=index * size: x[at : at + size], output)  # type: ignore[misc]
            for index in range(count)
        ]
    except Exception as error:
        raise_lack_of_memory(error)
        return None
    if plain and difference(sample.output, outputs[0]) is not None:
        return None
    found = [output_sqnr_db(sample.output, each) for each in outputs[plain:]]
    return [math.nan if value is None else value for value in found]


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


class Unobserved(Interpreter):
    """Runs a prepared graph without observing."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module.get_submodule(str(target))
        if is_observer(module):
            return self.passed(getattr(module, "activation_post_process", module), args[0])
        return super().call_module(target, args, kwargs)

    def passed(self, observer: Any, x: Any) -> Any:
        """What comes out of the place of an observer."""
        return x


class _Rounded(Unobserved):
    """Rounds the observed tensors."""

    def __init__(self, part: fx.GraphModule, ranging: Ranging) -> None:
        super().__init__(part)
        self._grids = {observer: _grid(ranged) for observer, ranged in ranging.items()}

    def passed(self, observer: Any, x: Any) -> Any:
        grid = self._grids.get(observer)
        if grid is None or not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        return torch.fake_quantize_per_tensor_affine(x, *grid)


class _SideBySide(Unobserved):
    """Leaves the first ``plain`` rows as they are, and rounds ``size`` rows by each ranging."""

    def __init__(
        self, part: fx.GraphModule, rangings: Sequence[Ranging], size: int, plain: int
    ) -> None:
        super().__init__(part)
        self._grids = [{o: _grid(ranged) for o, ranged in each.items()} for each in rangings]
        self._size, self._plain = size, plain

    def passed(self, observer: Any, x: Any) -> Any:
        grids = [each.get(observer) for each in self._grids]
        if None in grids or not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        others = x[self._plain :].split(self._size)  # type: ignore[no-untyped-call]
        rounded = map(torch.fake_quantize_per_tensor_affine, others, *zip(*grids, strict=True))
        return torch.cat([x[: self._plain], *rounded])
