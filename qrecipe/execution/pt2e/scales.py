"""Scales and zero points as tensors of a converted program, not numbers in its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qrecipe.execution.pt2e.operands import nodes_of_sites, weight_of
from qrecipe.model.addresses import is_conversion
from qrecipe.model.normalize import stored_in
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
    sites = {site.name: site for site in plan.sites}
    for name, nodes in nodes_of_sites(converted, plan).items():
        weights = filter(None, map(weight_of, nodes)) if _is_symmetric(sites[name]) else ()
        for dequantize in filter(is_conversion, weights):
            owner, stored_as = stored_in(dequantize.args[2], converted)  # type: ignore[arg-type]
            setattr(owner, stored_as, getattr(owner, stored_as).to(torch.int8))


def _is_symmetric(site: Site) -> bool:
    weight = site.qconfig.weight if site.qconfig else None
    is_symmetric = weight is not None and weight.qscheme == "per_channel_symmetric"
    return is_symmetric and site.mode == "weight_only"


def _stored(converted: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    converted.register_buffer(name, value)
    return converted.graph.get_attr(name)
