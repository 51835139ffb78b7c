"""Arithmetic with stored numbers for each channel, as in a frozen BatchNorm, becomes a module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.addresses import members_of
from qrecipe.model.altered_modules import alteration
from qrecipe.model.normalize import free_name, stored
from qrecipe.model.rewrites.batch_norms import FROZEN
from qrecipe.model.rewrites.shape_readers import readers_of_values

_COMMUTING: Mapping[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), torch.mul),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), torch.add),
}
_IN_ORDER: Mapping[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), torch.sub),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), torch.div),
}
"""Functions that are linear in an operand, any one or the first, and how they are computed."""

_NO_EPS = 1e-30
"""Added to a variance of 1 it changes nothing; torch 2.10 does not take 0."""

_BY_DIMENSIONS: Mapping[int, type[nn.modules.batchnorm._BatchNorm]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def channel_arithmetic_as_batch_norms(graph_module: fx.GraphModule, is_trained: bool) -> None:
    """Turn what is computed from a convolution and stored tensors into BatchNorms, in place.

    torch folds them into the convolution. Their tensors are new, so if the graph ``is_trained``,
    arithmetic with parameters that learn is left alone.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(node.target)
        if not isinstance(module, nn.modules.conv._ConvNd) or alteration(module) is not None:
            continue
        # without a batch dimension, the channels come first
        if node.meta["value"].rank == len(module.kernel_size) + 2:
            _replace_readers(node, module, graph_module, is_trained)


def _replace_readers(
    node: fx.Node,
    convolution: nn.modules.conv._ConvNd,
    graph_module: fx.GraphModule,
    is_trained: bool,
) -> None:
    dimensions = len(convolution.kernel_size)
    shape = (1, convolution.out_channels, *[1] * dimensions)
    # all of it is one linear function, given by two of its values
    at_zero, at_one = torch.zeros(shape).double(), torch.ones(shape).double()
    chain: list[fx.Node] = []
    source = node
    while len(readers := readers_of_values(source)) == 1:
        (reader,) = readers
        step = _step(reader, source, graph_module, is_trained)
        if step is None or step(at_zero).shape != shape:
            break
        at_zero, at_one = step(at_zero), step(at_one)
        chain.append(reader)
        source = reader
    if not chain:
        return
    module = _BY_DIMENSIONS[dimensions](convolution.out_channels, eps=_NO_EPS).eval()
    module.requires_grad_(False)
    module.weight.data = (at_one - at_zero).flatten().to(convolution.weight.dtype)
    module.bias.data = at_zero.flatten().to(convolution.weight.dtype)
    first, *others = chain
    inputs = {each for reader in chain for each in reader.all_input_nodes}
    first.meta["members"] = tuple(member for each in chain for member in members_of(each))
    first.meta[FROZEN] = True
    first.op, first.target = "call_module", free_name(graph_module, first.name)
    first.args, first.kwargs = (node,), {}
    graph_module.add_submodule(first.target, module)
    for each in others:
        each.replace_all_uses_with(first)
    for unread in (*reversed(others), *inputs.difference(chain)):
        if not unread.users:
            graph_module.graph.erase_node(unread)


def _step(
    reader: fx.Node, source: fx.Node, graph_module: fx.GraphModule, is_trained: bool
) -> Callable[[Tensor], Tensor] | None:
    """What a reader computes of its source, if that is linear with a stored tensor."""
    if reader.op != "call_function" or len(reader.args) != 2 or reader.kwargs:
        return None
    left, right = reader.args
    if right is source and reader.target in _COMMUTING:
        left, right = right, left
    function = _COMMUTING.get(reader.target) or _IN_ORDER.get(reader.target)
    operand = stored(right, graph_module)
    if function is None or left is not source or not isinstance(operand, Tensor):
        return None
    if is_trained and operand.requires_grad:
        return None
    return lambda x: function(x, operand.detach())
