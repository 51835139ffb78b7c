"""Layers with too little to multiply for int8, in each call or between two conversions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor, nn

from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.plan import Site

_CALL = 1 << 20
"""What a call costs in int8, whatever its size."""

_WEIGHT = 5
"""What reading a weight costs in float, once for all rows."""

_ELEMENT = 55
"""What it costs to quantize a number of the input, or to dequantize one of the result."""


_STEP = 3 << 18
"""What a product in an LSTM costs: nothing else runs between its steps."""

_GRU = 2 << 20
"""What a GRU saves at least. In float each of its steps costs as much as in int8."""

_MULTIPLYING = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def saved(rows: int, inputs: int, outputs: int, *, call: int = _CALL) -> int:
    """What a dynamic linear layer saves in a call, in multiplications; it is slower if negative.

    Measured for layers between others, with 64 to 1024 inputs and outputs and 1 to 520 rows, on
    CPUs with and without VNNI: docs/decisions/0046-small-layers.md.
    """
    return inputs * outputs * (rows + _WEIGHT) - _ELEMENT * rows * (inputs + outputs) - call


def small_layers(sites: Sequence[Site], inventory: Inventory) -> list[Site]:
    """The dynamic layers that are slower than in float, if they cost more than others save.

    None if there are static layers too: what those save is not known without measuring.
    """
    found: dict[str, int] = {}
    for site in sites:
        match = inventory.matches[site.name]
        if site.mode == "static" and match.has_weights:
            return []
        weight = None if site.qconfig is None else site.qconfig.weight
        is_int8 = site.mode == "dynamic" and weight is not None and weight.dtype == "int8"
        if is_int8 and isinstance(match.module, _MULTIPLYING) and match.shape:
            found[site.name] = _saved_by(match.module, match.shape)
    if sum(found.values()) >= 0:
        return []
    return [site for site in sites if found.get(site.name, 0) < 0]


def _saved_by(module: nn.Module, shape: Sequence[int]) -> int:
    """What a layer saves for an input of this shape."""
    call = _STEP if isinstance(module, nn.LSTM) else _CALL
    total = sum(
        calls * saved(rows, *reversed(weight.shape), call=call)
        for calls, rows, weight in _products(module, shape)
    )
    return max(total, _GRU) if isinstance(module, nn.GRU) else total


def _products(module: nn.Module, shape: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """How often each weight is multiplied with how many rows, for an input of this shape.

    In a recurrent layer, that of the hidden state is in each step.
    """
    rows, steps = prod(shape[:-1]), 1
    if isinstance(module, nn.RNNBase):
        steps = shape[int(module.batch_first)] if len(shape) > 2 else rows
    for name, weight in module.named_parameters():
        if weight.dim() == 2:
            calls = steps if name.startswith("weight_hh") else 1
            yield calls, rows // calls, weight


_CONVERSION = 1 << 20
"""The multiplications of a sample that pay for one conversion: decisions/0046-small-layers.md."""

_FEW = 4
"""With no more conversions, a model is int8 throughout, from its inputs to its outputs."""


def hardly_multiplies(sites: Sequence[Site], inventory: Inventory, boundaries: int) -> bool:
    """Whether a static model has too little work for each of its conversions."""
    layers = [
        inventory.matches[site.name]
        for site in sites
        if site.mode == "static" and inventory.matches[site.name].has_weights
    ]
    if not inventory.parts or boundaries <= _FEW:
        return False
    samples = inventory.parts[0].example.inputs.batch_size or 1
    return 0 < sum(map(_multiplications, layers)) < boundaries * samples * _CONVERSION


def _multiplications(layer: Match) -> int:
    """What a convolution or linear layer does on the example's few samples, 0 if unknown."""
    value = layer.nodes[-1].meta.get("value")
    if layer.module is None or value is None or value.shape is None:
        return 0
    weight = next(each for each in layer.module.parameters() if each.dim() > 1)
    count: int = prod(value.shape) * prod(weight.shape[1:])
    return count
