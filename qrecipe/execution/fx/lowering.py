"""Lowering of what torch does not know: moved integers, joined layouts, and SiLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.addresses import carries_data
from qrecipe.model.integers import laid_out_like, padded, plainly_laid_out, resampled, rolled
from qrecipe.model.moving import arguments, averages, last_name, moved
from qrecipe.model.nodes import module_of, reads_shape


def lower_ours(reference: fx.GraphModule, qconfigs: Mapping[str, Any]) -> None:
    """Let our kernels run between dequantize and quantize, in place.

    ``qconfigs`` are those of the nodes, None for what stays float.
    """
    for node in list(reference.graph.nodes):
        if qconfigs.get(node.name) is None or not _is_between(node):
            continue
        if node.target is moved:
            _move(node)
        elif node.target is F.interpolate and averages(node):
            _share_scale(node)
            node.target = resampled
            _list_sizes(node)
        elif node.target is F.silu or type(module_of(node)) is nn.SiLU:
            _multiply_by_sigmoid(node)


def read_shapes_of_integers(converted: fx.GraphModule) -> None:
    """Drop what is dequantized only to read its shape, in place."""
    for node in list(converted.graph.nodes):
        if node.target == "dequantize" and all(map(reads_shape, node.users)):
            node.replace_all_uses_with(node.all_input_nodes[0])
            converted.graph.erase_node(node)


_SUMS = (torch.ops.quantized.add, torch.ops.quantized.add_relu)
_JOINS = (*_SUMS, torch.ops.quantized.mul, torch.ops.quantized.mul_relu)
_CONVOLVING = frozenset({"Conv2d", "ConvReLU2d", "ConvTranspose2d"})
_KEEPING_LAYOUT = frozenset({"ReLU", "ReLU6", "MaxPool2d", "Hardswish", "Sigmoid", "Identity"})
"""Names of modules, which are torch's own in a converted graph."""


def join_in_one_layout(converted: fx.GraphModule) -> None:
    """Let sums and products of quantized tensors read both in one shape and layout, in place.

    Sums of what convolutions gave are left alone.
    """
    in_channels_last = _in_channels_last(converted)
    for node in list(converted.graph.nodes):
        is_join = node.target in _JOINS and node.args[0] is not node.args[1]
        if not is_join or not all(
            isinstance(each, fx.Node) and carries_data(each) for each in node.args[:2]
        ):
            continue
        if node.target in _SUMS and node in in_channels_last:
            continue
        for own, other in ((0, 1), (1, 0)):
            pair = (node.args[own], node.args[other])
            with converted.graph.inserting_before(node):
                node.update_arg(own, converted.graph.call_function(laid_out_like, pair))


def average_in_one_layout(converted: fx.GraphModule) -> None:
    """Let averages read images of one pixel or one channel, in place."""
    for node in list(converted.graph.nodes):
        if node.target is torch.mean and True not in (node.kwargs.get("keepdim"), *node.args[2:]):
            with converted.graph.inserting_before(node):
                source = converted.graph.call_function(plainly_laid_out, node.args[:1])
            node.update_arg(0, source)


def _in_channels_last(converted: fx.GraphModule) -> set[fx.Node]:
    """The quantized images in channels_last, as convolutions give them."""
    found: set[fx.Node] = set()
    for node in converted.graph.nodes:
        kind = type(module_of(node)).__name__
        keeps = kind in _KEEPING_LAYOUT or node.target in (F.relu, *_SUMS)
        sources = [source for source in node.all_input_nodes if carries_data(source)]
        if kind in _CONVOLVING or (keeps and sources and found.issuperset(sources)):
            found.add(node)
    return found


def _is_between(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    is_fed = isinstance(source, fx.Node) and source.target == "dequantize"
    return is_fed and all(user.target is torch.quantize_per_tensor for user in node.users)


def _move(node: fx.Node) -> None:
    _share_scale(node)
    given = arguments(node)
    if last_name(node) == "roll":
        shifts, dims = map(_listed, (given["shifts"], given["dims"]))
        node.target, node.args = rolled, (node.args[0], shifts, dims)
    elif last_name(node) == "pad" and given.get("mode") in (None, "constant"):
        node.target, node.args = padded, (node.args[0], _listed(given["pad"]))


def _list_sizes(node: fx.Node) -> None:
    """Give an interpolation a number for each dimension, as TorchScript wants it."""
    dimensions = node.meta["value"].rank - 2
    for key, number in (("size", int), ("scale_factor", float)):
        value: Any = node.kwargs[key]
        if isinstance(value, (int, float)):
            value = [value] * dimensions
        if isinstance(value, (tuple, list)):
            value = [each if isinstance(each, fx.Node) else number(each) for each in value]
        node.update_kwarg(key, value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _share_scale(node: fx.Node) -> None:
    """Take and give integers: input and output share an observer, and so scale and zero point."""
    node.update_arg(0, node.all_input_nodes[0].args[0])
    for quantize in list(node.users):
        quantize.replace_all_uses_with(node)
        node.graph.erase_node(quantize)


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
