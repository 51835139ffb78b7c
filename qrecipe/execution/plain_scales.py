"""Scales and zero points as numbers in a graph, as exporters and compilers want them."""

from __future__ import annotations

from typing import Any

from torch import fx

from qrecipe.model.copies import runnable_copy
from qrecipe.model.nodes import stored

_WITH_TENSORS = (
    "quantized_decomposed.quantize_per_tensor.tensor",
    "quantized_decomposed.dequantize_per_tensor.tensor",
)


def spell_out(node: fx.Node) -> None:
    """Make a stored scale and zero point plain numbers, in place; computed ones stay."""
    if str(node.target) in _WITH_TENSORS and stored(node.args[1]) is not None:
        source, scale, zero_point, *rest = node.args
        operator: Any = node.target
        node.target = operator.overloadpacket.default
        numbers = float(stored(scale)), int(stored(zero_point))
        node.args = (source, *numbers, *rest)


def with_plain_scales(converted: fx.GraphModule) -> fx.GraphModule:
    """A copy of a converted program without the tensors of its scales."""
    made = runnable_copy(converted)
    for node in made.graph.nodes:
        spell_out(node)
    made.graph.eliminate_dead_code()
    return fx.GraphModule(made, made.graph)
