"""Scales and zero points as tensors of a converted program, not numbers in its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qrecipe.model.addresses import site_of
from qrecipe.planning.plan import Plan, Site

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


def shorten_zero_points(converted: fx.GraphModule, plan: Plan) -> None:
    """Store those in 8 bits that are always 0, of weight-only sites, in place.

    They are subtracted from the weight in their type, and in 64 bits that takes most of the time of
    a call. Kernels of other sites take them as they are.
    """
    symmetric = {site.name for site in plan.sites if _is_symmetric(site)}
    weights = {
        node
        for node in converted.graph.nodes
        if node.target is _decomposed.dequantize_per_channel.default
        and symmetric.issuperset(map(site_of, node.users))
    }
    readers: dict[str, set[fx.Node]] = {}
    for node in converted.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), set()).update(node.users)
    for name in {str(weight.args[2].target) for weight in weights}:
        if weights.issuperset(readers[name]):
            converted.register_buffer(name, converted.get_buffer(name).to(torch.int8))


def _is_symmetric(site: Site) -> bool:
    weight = site.qconfig.weight if site.qconfig else None
    is_symmetric = weight is not None and weight.qscheme == "per_channel_symmetric"
    return is_symmetric and site.mode == "weight_only"


def _stored(converted: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    converted.register_buffer(name, value)
    return converted.graph.get_attr(name)
