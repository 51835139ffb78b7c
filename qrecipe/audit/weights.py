"""The weights of a site, in float and as the quantized kernel has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.addresses import is_conversion
from qrecipe.model.nodes import graph_module_of, module_of, stored, stored_value


def float_weights(node: fx.Node) -> list[Tensor]:
    """The weights of the first node of a site in a fused graph, BatchNorm folded in."""
    module = module_of(node)
    return [] if module is None else weights_of_module(module)


def weights_of_module(module: nn.Module) -> list[Tensor]:
    """The weights of a float module; for a fused module those of its first one."""
    inner: Any = module[0] if isinstance(module, nn.Sequential) else module
    if isinstance(inner, nn.RNNBase):
        names = [name for name in inner._flat_weights_names if name.startswith("weight")]
        return [getattr(inner, name).detach() for name in names]
    weight = getattr(inner, "weight", None)
    return [weight.detach()] if isinstance(weight, Tensor) else []


def quantized_weights(node: fx.Node) -> list[Tensor]:
    """The weights that a node of a converted graph computes with, dequantized."""
    module = module_of(node)
    return _of_program(node) if module is None else weights_of_kernel(module)


def weights_of_kernel(module: Any) -> list[Tensor]:
    """The weights of a quantized module, dequantized."""
    if isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    if hasattr(module, "get_weight"):
        found = module.get_weight()
        return [_plain(w) for w in (found.values() if isinstance(found, dict) else [found])]
    weight = getattr(module, "weight", None)
    value = weight() if callable(weight) and not isinstance(weight, Tensor) else weight
    return [_plain(value)] if isinstance(value, Tensor) else []


def _plain(weight: Tensor) -> Tensor:
    return weight.dequantize() if weight.is_quantized else weight.detach()


def _of_program(node: fx.Node) -> list[Tensor]:
    found: list[Tensor] = []
    for source in node.all_input_nodes:
        if is_conversion(source) and all(each.op == "get_attr" for each in source.all_input_nodes):
            dequantize: Any = source.target  # of a program, which stores integers
            found.append(dequantize(*(stored_value(each) for each in source.args)))
    return [*found, *looked_up(node)]


SCALE, ZERO_POINT = "_scale", "_zero_point"
"""What follows the name of a table of integers in the names of what they stand for, by row."""


def looked_up(node: fx.Node) -> list[Tensor]:
    """The values of the table of integers whose rows a node of a program reads, if it does."""
    return [
        value
        for source in node.all_input_nodes
        if source.target is torch.ops.aten.embedding.default
        for value in _table(source.args[0])
    ]


def _table(source: Any) -> list[Tensor]:
    integers = stored(source)
    if integers is None or integers.is_floating_point():
        return []
    name = str(source.target)
    program = graph_module_of(source)
    scale, zero_point = (program.get_buffer(name + part) for part in (SCALE, ZERO_POINT))
    return [(integers - zero_point) * scale]
