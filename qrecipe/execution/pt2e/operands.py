"""What the operators of a program read: data, weights, and numbers that stay float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qrecipe.audit.float_kernels import bits_of_dynamic_input
from qrecipe.execution.pt2e.batch_norms import hidden_batch_norm
from qrecipe.model.addresses import site_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import TensorSpec

Role = Literal["data", "weight", "parameter"]

_aten: Any = torch.ops.aten

_WEIGHT: Mapping[Any, int] = {
    **dict.fromkeys((_aten.conv1d.default, _aten.conv1d.padding), 1),
    **dict.fromkeys((_aten.conv2d.default, _aten.conv2d.padding), 1),
    **dict.fromkeys((_aten.conv3d.default, _aten.conv3d.padding), 1),
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 1,
    _aten.conv_transpose3d.input: 1,
    _aten.linear.default: 1,
}
"""The position of the weight; a bias follows it."""

_PARAMETERS: Mapping[Any, tuple[int, ...]] = {
    **dict.fromkeys(_WEIGHT, (2,)),
    **dict.fromkeys((_aten.batch_norm.default, hidden_batch_norm), (1, 2, 3, 4)),
    _aten.instance_norm.default: (1, 2, 3, 4),
    _aten.group_norm.default: (2, 3),
    _aten.layer_norm.default: (2, 3),
    _aten.prelu.default: (1,),
}
"""The positions of parameters that stay float, such as biases and statistics."""


def is_float(node: fx.Node) -> bool:
    """Whether a node of an exported program gives floating-point tensors."""
    return _is_float(node.meta.get("val"))


def _is_float(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_is_float, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def gives_tensor(node: fx.Node) -> bool:
    """Whether a node gives one tensor, not several."""
    return isinstance(node.meta.get("val"), Tensor)


def operands(node: fx.Node) -> Iterator[tuple[fx.Node, Role]]:
    """The nodes that an operator reads, in order, each with its role there."""
    weight, parameters = _WEIGHT.get(node.target), _PARAMETERS.get(node.target, ())
    for index, argument in enumerate((*node.args, *node.kwargs.values())):
        role: Role = "data"
        if index == weight:
            role = "weight"
        elif index in parameters:
            role = "parameter"
        for source in argument if isinstance(argument, (tuple, list)) else (argument,):
            if isinstance(source, fx.Node):
                yield source, role


def weight_of(node: fx.Node) -> fx.Node | None:
    """What an operator multiplies with, if it has a weight."""
    return next((source for source, role in operands(node) if role == "weight"), None)


def nodes_of_sites(program: fx.GraphModule, plan: Plan) -> dict[str, list[fx.Node]]:
    """The operators of each planned site that compute floating-point tensors, in order."""
    found: dict[str, list[fx.Node]] = {site.name: [] for site in plan.sites}
    for node in program.graph.nodes:
        name = site_of(node)
        if name in found and node.op in ("call_function", "call_module") and is_float(node):
            found[name].append(node)
    return found


def constant_nodes(program: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on no input."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "placeholder" and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def is_static(site: Site | None) -> bool:
    return site is not None and site.mode == "static"


def gives_integers(site: Site | None) -> bool:
    return site is not None and site.gives_integers


def input_spec(site: Site, plan: Plan) -> TensorSpec | None:
    """The spec that a float input of a site gets; with the range of the backend's dynamic kernels.

    They use 7 bits where 8 may saturate, which kernels that a program is lowered to may do as well.
    """
    if site.qconfig is None or site.mode == "weight_only":
        return None
    spec = site.qconfig.activation
    if spec is None or site.mode != "dynamic":
        return spec
    return spec.model_copy(update={"quant_max": 2 ** bits_of_dynamic_input(plan.backend) - 1})
