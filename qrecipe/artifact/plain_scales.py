"""Scales and zero points as numbers in a graph, as exporters and compilers want them."""

from __future__ import annotations

from typing import Any

from torch import fx

from qrecipe.model.normalize import stored

_WITH_TENSORS = (
    "quantized_decomposed.quantize_per_tensor.tensor",
    "quantized_decomposed.dequantize_per_tensor.tensor",
)


def spell_out(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Make a stored scale and zero point plain numbers, in place; computed ones stay."""
    if str(node.target) in _WITH_TENSORS and stored(node.args[1], graph_module) is not None:
        source, scale, zero_point, *rest = node.args
        operator: Any = node.target
        node.target = operator.overloadpacket.default
        numbers = float(stored(scale, graph_module)), int(stored(zero_point, graph_module))
        node.args = (source, *numbers, *rest)
