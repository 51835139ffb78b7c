"""The prepared model of a converted one, made again: exporters start from it.

A converted model has integers, scales and zero points, and its plan says which observers there
were. What each of them gave is found by a conversion in which each gives a scale of its own. That
conversion is the proof as well: everything else has to be as in the converted model, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import (
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    QConfig,
    StandIn,
)
from qrecipe._torch_fx import FusedConvBatchNorm, FusedLinearBatchNorm
from qrecipe.errors.findings import ArtifactError
from qrecipe.execution.packing import one_each
from qrecipe.execution.state import slots_of
from qrecipe.model.addresses import observed_name
from qrecipe.model.graph_names import outer
from qrecipe.model.same_graph import observes
from qrecipe.rules.resolution import listed

_State = Mapping[str, Tensor]
"""The plain tensors of a converted model, by their names in a file."""

_Grid = tuple[Tensor, Tensor]
"""Scale and zero point, as observers give them."""

_make_qconfig: Any = QConfig  # torch leaves its constructor untyped


def recover(
    prepared: fx.GraphModule,
    converted: fx.GraphModule,
    convert: Callable[[fx.GraphModule], fx.GraphModule],
) -> None:
    """Give a prepared model the weights and ranges that ``converted`` was made of, in place.

    Weights get the values that their integers stand for. ``convert`` is the conversion. Raises
    ``ArtifactError`` (QR512) if it gives another model.
    """
    state = _state(converted)
    _take_weights(prepared, state)
    observers = dict(_unknown(prepared))
    for number, observer in enumerate(observers):
        vars(observer)["calculate_qparams"] = partial(_marked, observer.calculate_qparams, number)
    grids, differing = _compared(_state(convert(prepared)), state, len(observers))
    lost = [name for number, name in enumerate(observers.values()) if number not in grids]
    if differing or lost:
        text = f"the stored model cannot be rebuilt for export: {listed([*differing, *lost])}"
        hint = "export it from its recipe, and report the model"
        raise ArtifactError.of("QR512", text, hint=hint)
    for number, observer in enumerate(observers):
        _fix(observer, grids[number])


def _state(converted: fx.GraphModule) -> _State:
    return {name: each for slot in slots_of(converted) for name, each in slot.tensors().items()}


def _unknown(prepared: fx.GraphModule) -> Iterator[tuple[Any, str]]:
    """The observers whose ranges are not known yet, and what they observe."""
    for node in filter(observes, prepared.graph.nodes):
        observer: Any = prepared.get_submodule(str(node.target))
        if isinstance(observer, StandIn):
            observer = getattr(observer, "activation_post_process", None)
        is_known = isinstance(observer, _FIXED) or "calculate_qparams" in vars(observer)
        if observer.dtype in _INTEGERS and not is_known:
            yield observer, observed_name(node)


_FIXED = (FixedQParamsObserver, FixedQParamsFakeQuantize)
_INTEGERS = (torch.qint8, torch.quint8, torch.qint32)


def _marked(calculate: Callable[[], _Grid], number: int) -> _Grid:
    scale, zero_point = calculate()
    return torch.full_like(scale, _scale(number)), torch.full_like(zero_point, _zero(number))


def _scale(number: int) -> float:
    """A scale that no other observer gives, and that float32 has exactly."""
    return 1.5 + (number + 1) * 2.0**-20


def _zero(number: int) -> int:
    return number % 100


def _compared(trial: _State, state: _State, count: int) -> tuple[Mapping[int, _Grid], list[str]]:
    """What ``state`` has at the place of each mark, and the tensors that differ otherwise."""
    if others := trial.keys() ^ state.keys():
        return {}, sorted(others)
    numbers = {_scale(number): number for number in range(count)}
    grids: dict[int, _Grid] = {}
    is_same = {name: torch.equal(tensor, state[name]) for name, tensor in trial.items()}
    for name, tensor in trial.items():
        head, is_scale, tail = name.rpartition("scale")
        number = numbers.get(float(tensor.flatten()[0])) if is_scale and tensor.numel() else None
        other = f"{head}zero_point{tail}"
        if number is None or other not in trial or bool((trial[other] != _zero(number)).any()):
            continue
        grid = _grid(state[name], state[other])
        is_right = all(map(torch.equal, grids.setdefault(number, grid), grid))
        is_same[name] = is_same[other] = is_right
    return grids, [name for name, same in is_same.items() if not same]


def _grid(scale: Tensor, zero_point: Tensor) -> _Grid:
    return scale.float().reshape(-1), zero_point.reshape(-1)


def _fix(observer: Any, grid: _Grid) -> None:
    """Make an observer or fake-quant give this grid, whatever it sees."""
    vars(observer)["calculate_qparams"] = lambda: grid
    if isinstance(observer, FakeQuantizeBase):  # it rounds by what it has found
        observer.disable_observer()
        for name, value in zip(("scale", "zero_point"), grid, strict=True):
            own = getattr(observer, name)
            own.data = value.to(own.dtype)


def _fixed(make: Callable[[], nn.Module], grid: _Grid) -> nn.Module:
    observer = make()
    _fix(observer, grid)
    return observer


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """The integers of a weight and their grid; a reference module has float values instead."""

    stored: Tensor
    grid: _Grid

    @classmethod
    def at(cls, state: _State, place: str) -> _Weight:
        stored, *grid = (state[f"{place}.weight{part}"] for part in ("", "_scale", "_zero_point"))
        return cls(stored, _grid(*grid))

    def values(self, shape: torch.Size) -> Tensor:
        if self.stored.is_floating_point():
            return self.stored
        # torch packs one dimension as two
        codes = one_each(self.stored, shape).float()
        scale, zero_point = (each.view(-1, *[1] * (len(shape) - 1)) for each in self.grid)
        return (codes - zero_point.float()) * scale


def _take_weights(prepared: fx.GraphModule, state: _State) -> None:
    for node in list(prepared.graph.nodes):
        name = outer(str(node.target))
        if node.op == "get_attr" and name in state:
            _set(prepared, str(node.target), state[name])
        elif node.op == "call_module":
            _take_module(prepared.get_submodule(str(node.target)), name, state)
    prepared.graph.eliminate_dead_code()
    prepared.recompile()


def _take_module(module: Any, name: str, state: _State) -> None:
    if isinstance(module, (FusedConvBatchNorm, FusedLinearBatchNorm)):
        _fold(module)
    for own, tensor in (*module.named_parameters(), *module.named_buffers()):
        # what is fused in one of the models need not be in the other
        for place in (f"{name}.{own}", f"{name}.0.{own}", f"{name}.{own.removeprefix('0.')}"):
            if place in state and state[place].dtype == tensor.dtype:
                _set(module, own, state[place])
    layer: Any = module if hasattr(module, "weight") else next(module.children(), None)
    for place in (name, f"{name}.0"):
        if f"{place}.weight_scale" in state:
            weight = _Weight.at(state, place)
            _set(layer, "weight", weight.values(layer.weight.shape))
            _fix_weight(module, layer, weight.grid)


def _fix_weight(module: Any, layer: Any, grid: _Grid) -> None:
    if hasattr(layer, "weight_fake_quant"):
        _fix(layer.weight_fake_quant, grid)
    else:
        weight = partial(_fixed, module.qconfig.weight, grid)
        module.qconfig = _make_qconfig(activation=module.qconfig.activation, weight=weight)


def _fold(layer: Any) -> None:
    """Make the BatchNorm of a trained layer do nothing, in place: conversion has folded it."""
    norm = layer.bn
    norm.eps = 0.5  # with the variance exactly one; torch 2.10 wants it positive
    neutral = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 0.5}
    for name, value in neutral.items():
        _set(norm, name, torch.full_like(getattr(norm, name), value))
    layer.bias = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = own in owner._parameters
    setattr(owner, own, nn.Parameter(value, requires_grad=False) if is_parameter else value)
