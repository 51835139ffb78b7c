"""Scales and zero points as tensors of a converted program, not numbers in its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_decomposed: Any = torch.ops.quantized_decomposed
_WITH_TENSORS = {
    _decomposed.quantize_per_tensor.default: _decomposed.quantize_per_tensor.tensor,
    _decomposed.dequantize_per_tensor.default: _decomposed.dequantize_per_tensor.tensor,
}


def store_scales(converted: fx.GraphModule) -> None:
    """Let the state of the program hold them, in place, so that its code is that of the plan.

    What dequantizes reads the pair of what quantized.
    """
    graph = converted.graph
    pairs: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target not in _WITH_TENSORS:
            continue
        source = node.args[0]
        if source not in pairs:
            with graph.inserting_before(node):
                pairs[node] = (
                    _stored(converted, f"{source.name}_scale", torch.tensor(node.args[1])),
                    _stored(converted, f"{source.name}_zero_point", torch.tensor(node.args[2])),
                )
        pair = pairs[source if source in pairs else node]
        node.target = _WITH_TENSORS[node.target]
        node.args = (source, *pair, *node.args[3:])
    converted.recompile()


def _stored(converted: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    converted.register_buffer(name, value)
    return converted.graph.get_attr(name)
