"""Biases of layers with integers: without gradients, and for XNNPACK rounded as it has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from qrecipe.execution.pt2e.operands import weight_of
from qrecipe.execution.pt2e.reference import Rounding
from qrecipe.model.addresses import is_conversion
from qrecipe.model.nodes import free_name, stored

_BIAS = 2
"""The position of a bias, after the data and the weight."""


def freeze_biases(converted: fx.GraphModule) -> None:
    """Let biases that only quantized layers add need no gradients, in place.

    Kernels of integers give none. The parameters are new ones, since prepared programs share them.
    """
    readers: dict[str, set[fx.Node]] = {}
    for node in converted.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), set()).update(node.users)
    quantized = {node for node in converted.graph.nodes if _has_integers(node)}
    frozen: dict[int, nn.Parameter] = {}
    for name, users in readers.items():
        owner, _, own = name.rpartition(".")
        module = converted.get_submodule(owner)
        bias = getattr(module, own)
        if isinstance(bias, nn.Parameter) and users and quantized.issuperset(users):
            frozen.setdefault(id(bias), nn.Parameter(bias.detach(), requires_grad=False))
            setattr(module, own, frozen[id(bias)])


def round_biases(program: fx.GraphModule) -> None:
    """Round the biases of layers with static ranges as XNNPACK does, in place.

    The program is converted, or the reference of one. They are integers, at the scale of the
    products that they are added to.

    Each call of a layer gets a bias of its own, since its input has a scale of its own.
    """
    for layer in list(program.graph.nodes):
        if weight_of(layer) is None or len(layer.args) <= _BIAS:
            continue
        data, weight, bias = (
            _scale(layer.args[0], program),
            _scale(layer.args[1], program),
            stored(layer.args[_BIAS]),
        )
        if data is None or weight is None or bias is None:
            continue
        scale = data * weight
        name = free_name(program, f"{layer.name}_bias")
        program.register_buffer(name, (bias.detach() / scale).round() * scale)
        with program.graph.inserting_before(layer):
            layer.replace_input_with(layer.args[_BIAS], program.graph.get_attr(name))
    program.recompile()


def _has_integers(layer: fx.Node) -> bool:
    weight = weight_of(layer)
    return weight is not None and is_conversion(weight)


def _scale(node: Any, program: fx.GraphModule) -> Tensor | None:
    """The scale that a node dequantizes with, or that a reference rounds with, if it is stored."""
    if is_conversion(node):
        scale: Tensor | None = stored(node.args[1])
        return scale
    module = program.get_submodule(node.target) if node.op == "call_module" else None
    return module.scale if isinstance(module, Rounding) else None
