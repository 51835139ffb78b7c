"""Lowering of what torch's tables do not know: calls that only move integers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qrecipe.model.moving import arguments, last_name, moved, padded
from qrecipe.model.trace_proof import Value


def lower_moves(reference: fx.GraphModule, qconfigs: Mapping[str, Any]) -> None:
    """Let calls move integers instead of floats between dequantize and quantize, in place.

    Their inputs and outputs share an observer, and so scale and zero point. ``qconfigs`` are those
    of the nodes, None for what stays float.
    """
    for node in list(reference.graph.nodes):
        if node.target is not moved or qconfigs.get(node.name) is None:
            continue
        source: Any = node.args[0]
        if source.target != "dequantize" or not all(map(_quantizes, node.users)):
            continue
        node.update_arg(0, source.args[0])
        for quantize in list(node.users):
            quantize.replace_all_uses_with(node)
            reference.graph.erase_node(quantize)
        if last_name(node) == "roll":
            _cut_and_join(node)
        elif last_name(node) == "pad" and arguments(node).get("mode") in (None, "constant"):
            node.target, node.args = padded, (node.args[0], arguments(node)["pad"])


def _quantizes(node: fx.Node) -> bool:
    return node.target is torch.quantize_per_tensor


def _cut_and_join(node: fx.Node) -> None:
    """Roll along one dimension after the other, as no kernel does it."""
    given = arguments(node)
    shifts, dims = (
        value if isinstance(value, (tuple, list)) else (value,)
        for value in (given["shifts"], given["dims"])
    )
    graph, rolled = node.graph, node.args[0]
    with graph.inserting_before(node):
        for shift, dim in zip(shifts, dims, strict=True):
            size = graph.call_method("size", (rolled, dim))
            start = graph.call_function(operator.mod, (-shift, size))
            size.meta["value"] = start.meta["value"] = Value(False, False)
            parts = graph.call_method("tensor_split", (rolled, (start,), dim))
            swapped = graph.call_function(operator.getitem, (parts, slice(None, None, -1)))
            rolled = graph.call_function(torch.cat, (swapped, dim))
    assert isinstance(rolled, fx.Node)
    rolled.meta = dict(node.meta)
    node.replace_all_uses_with(rolled)
    graph.erase_node(node)
