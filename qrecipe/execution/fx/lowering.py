"""Lowering of what torch's tables do not know: calls that move integers, and SiLU."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.moving import arguments, last_name, moved, padded
from qrecipe.model.rewrites.shape_readers import reads_shape
from qrecipe.model.trace_proof import Value


def lower_ours(reference: fx.GraphModule, qconfigs: Mapping[str, Any]) -> None:
    """Let our kernels run between dequantize and quantize, in place.

    ``qconfigs`` are those of the nodes, None for what stays float.
    """
    modules = dict(reference.named_modules(remove_duplicate=False))
    for node in list(reference.graph.nodes):
        if qconfigs.get(node.name) is None or not _is_between(node):
            continue
        if node.target is moved:
            _move(node)
        elif node.target is F.silu or type(modules.get(str(node.target))) is nn.SiLU:
            _multiply_by_sigmoid(node)


def read_shapes_of_integers(converted: fx.GraphModule) -> None:
    """Drop what is dequantized only to read its shape, in place."""
    for node in list(converted.graph.nodes):
        if node.target == "dequantize" and all(map(reads_shape, node.users)):
            node.replace_all_uses_with(node.all_input_nodes[0])
            converted.graph.erase_node(node)


def _is_between(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    is_fed = isinstance(source, fx.Node) and source.target == "dequantize"
    return is_fed and all(user.target is torch.quantize_per_tensor for user in node.users)


def _move(node: fx.Node) -> None:
    """Move integers: input and output share an observer, and so scale and zero point."""
    node.update_arg(0, node.all_input_nodes[0].args[0])
    for quantize in list(node.users):
        quantize.replace_all_uses_with(node)
        node.graph.erase_node(quantize)
    if last_name(node) == "roll":
        _cut_and_join(node)
    elif last_name(node) == "pad" and arguments(node).get("mode") in (None, "constant"):
        node.target, node.args = padded, (node.args[0], arguments(node)["pad"])


def _multiply_by_sigmoid(node: fx.Node) -> None:
    x = node.all_input_nodes[0].args[0]
    for quantize in list(node.users):
        _, scale, zero_point, _ = quantize.args
        with node.graph.inserting_before(quantize):
            sigmoid = node.graph.call_function(torch.sigmoid, (x,))
            product = node.graph.call_function(
                torch.ops.quantized.mul, (x, sigmoid, scale, zero_point)
            )
        product.meta = dict(node.meta)
        quantize.replace_all_uses_with(product)
        node.graph.erase_node(quantize)
    node.graph.erase_node(node)


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
