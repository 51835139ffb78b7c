"""Biases as XNNPACK has them: integers, at the scale of the products that they are added to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from qrecipe.execution.pt2e.operands import weight_of
from qrecipe.model.addresses import is_conversion
from qrecipe.model.normalize import free_name, stored

_BIAS = 2
"""The position of a bias, after the data and the weight."""


def round_biases(converted: fx.GraphModule) -> None:
    """Round the biases of layers with static ranges as XNNPACK does, in place.

    Each call of a layer gets a bias of its own, since its input has a scale of its own.
    """
    for layer in list(converted.graph.nodes):
        if weight_of(layer) is None or len(layer.args) <= _BIAS:
            continue
        data, weight, bias = (
            _scale(layer.args[0], converted),
            _scale(layer.args[1], converted),
            stored(layer.args[_BIAS], converted),
        )
        if data is None or weight is None or bias is None:
            continue
        scale = data * weight
        name = free_name(converted, f"{layer.name}_bias")
        converted.register_buffer(name, (bias.detach() / scale).round() * scale)
        with converted.graph.inserting_before(layer):
            layer.replace_input_with(layer.args[_BIAS], converted.graph.get_attr(name))
    converted.recompile()


def _scale(node: Any, converted: fx.GraphModule) -> Tensor | None:
    """The scale that a node dequantizes with, if it is stored."""
    return stored(node.args[1], converted) if is_conversion(node) else None
