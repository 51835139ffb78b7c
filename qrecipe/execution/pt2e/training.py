"""Programs that can be trained, and what they are once they have been trained.

A program is captured in eval mode. What is otherwise in training mode is a module that the program
calls: norms that keep statistics, and what drops. A weight is rounded as the BatchNorm after its
layer scales it, so that both can be folded afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.errors.findings import Finding
from qrecipe.execution.fake_quants import freeze_batch_norm
from qrecipe.execution.pt2e.capture import GIVER, captured
from qrecipe.execution.pt2e.operands import weight_of
from qrecipe.model.addresses import DROPS, SITE
from qrecipe.model.call import Inputs
from qrecipe.model.copies import structural_copy
from qrecipe.model.nodes import free_name, module_of, stored
from qrecipe.model.rewrite_proof import divides_by_zero
from qrecipe.model.rewrites.batch_norms import FROZEN, SYNCHRONISED, synchronise
from qrecipe.planning.plan import Plan

_aten: Any = torch.ops.aten
_BatchNorm = nn.modules.batchnorm._BatchNorm

_KEEP_STATISTICS = (_aten.batch_norm.default, _aten.instance_norm.default)
_RUNNING_MEAN, _BY_BATCH = 3, 5
"""The positions of the running mean, and of whether it is that of the batch."""

_OPERATOR = "operator"
"""In a node's ``meta``: the operator that the called module is in a program that is not trained.

With the arguments after the first, and names of tensors as `_Stored`.
"""


class _Stored(str):
    """The name of a tensor of a program."""


class ScaledByNorm(nn.Module):
    """A layer and the BatchNorm after it, with the weight that both have together.

    As torch trains them: the result is divided by what the weight was multiplied with, and then
    normalised by the statistics of the batch.
    """

    def __init__(self, fused: nn.Sequential) -> None:
        super().__init__()
        self.layer, self.norm, *rest = fused
        self.rest = nn.Sequential(*rest)

    def forward(self, x: Tensor) -> Any:
        layer: Any = self.layer
        norm: Any = self.norm
        deviation = torch.sqrt(norm.running_var + norm.eps)
        scale = 1 / deviation if norm.weight is None else norm.weight / deviation
        ones = [1] * (layer.weight.dim() - 2)
        weight = layer.weight * scale.view(-1, 1, *ones)
        y = getattr(layer, "_conv_forward", F.linear)(x, weight, None) / scale.view(-1, *ones)
        if layer.bias is not None:
            y = y + layer.bias.view(-1, *ones)
        return self.rest(norm(y))


def trainable(graph_module: fx.GraphModule, inputs: Inputs, plan: Plan) -> fx.GraphModule:
    """As `capture.captured`, for a graph that torch has fused for training."""
    source = structural_copy(graph_module).eval()
    drops = _set_drops_aside(source)
    for node, module in _with_norms(source, plan):
        source.set_submodule(str(node.target), ScaledByNorm(module))
    program = captured(source, inputs)
    givers = {node.name: node for node in source.graph.nodes}
    for node in list(program.graph.nodes):
        giver = givers.get(node.meta.get(GIVER, ""))
        if giver is not None and giver.name in drops:
            _call(node, program, free_name(program, giver.name), drops[giver.name])
            node.meta[DROPS] = True
        elif node.target in _KEEP_STATISTICS:
            _call_norm(node, program, source, giver)
        elif giver is not None and giver.op == "call_module":
            _tell_mode(node, program)
    _finish(program)
    return program


def _set_drops_aside(source: fx.GraphModule) -> dict[str, nn.Module]:
    """Put something in place of the calls that only drop in training; returns what was called."""
    drops: dict[str, nn.Module] = {}
    for node in source.graph.nodes:
        if DROPS in node.meta:
            drops[node.name] = module_of(node)
            node.op, node.target = "call_function", _aten.alias.default
            node.args, node.kwargs = tuple(node.all_input_nodes[:1]), {}
    source.recompile()
    return drops


def check_scales(graph_module: fx.GraphModule, plan: Plan) -> None:
    """Raises ``PlanError`` (QR306) if the weight of a layer would be scaled by 0."""
    for node, module in _with_norms(graph_module, plan):
        if module[1].affine and bool((module[1].weight == 0).any()):
            raise divides_by_zero(node.meta[SITE])


def hidden_drops(graph_module: fx.GraphModule) -> Iterator[Finding]:
    """Warnings (QR205) about modules that are called as a whole and drop inside."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and DROPS not in node.meta:
            module = module_of(node)
            if any(map(_drops, module.modules())):
                yield Finding(
                    "QR205",
                    f"{node.target} has dropout in training mode; only its eval branch is trained",
                    hint="let it be traced, or apply dropout before or after it",
                )


def _drops(module: nn.Module) -> bool:
    share: float = getattr(module, "dropout", 0) if isinstance(module, nn.MultiheadAttention) else 0
    return share > 0 or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)


def _with_norms(graph_module: fx.GraphModule, plan: Plan) -> Iterator[tuple[fx.Node, Any]]:
    """The calls of a layer and its BatchNorm whose weight is quantized, and what they call."""
    quantized = {site.name for site in plan.sites if site.qconfig and site.qconfig.weight}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.meta.get(SITE) in quantized:
            module = module_of(node)
            if isinstance(module, nn.Sequential) and isinstance(module[1], _BatchNorm):
                yield node, module


def _call_norm(
    node: fx.Node, program: fx.GraphModule, source: fx.GraphModule, giver: fx.Node | None
) -> None:
    """Let a program call the module that an operator with running statistics was."""
    mean, by_batch = node.args[_RUNNING_MEAN], node.args[_BY_BATCH]
    if by_batch or not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return
    path = str(mean.target).rpartition(".")[0]
    module = source.get_submodule(path)
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return
    node.meta[_OPERATOR] = (
        node.target,
        tuple(
            _Stored(each.target) if isinstance(each, fx.Node) else each for each in node.args[1:]
        ),
    )
    _call(node, program, path, module)
    marks = {} if giver is None else giver.meta
    if FROZEN in marks:
        freeze_batch_norm(module)
    elif SYNCHRONISED in marks:
        node.meta[SYNCHRONISED] = marks[SYNCHRONISED]
        synchronise(node, program)


def _call(node: fx.Node, program: fx.GraphModule, path: str, module: nn.Module) -> None:
    program.add_submodule(path, module)
    node.op, node.target = "call_module", path
    node.args, node.kwargs = node.args[:1], {}


class _InTraining(nn.Module):
    """Tells an operator whether it is trained."""

    def forward(self) -> bool:
        return self.training


def _tell_mode(node: fx.Node, program: fx.GraphModule) -> None:
    """Tell an operator of a module whether it is trained, such as a recurrent layer that drops."""
    schema = getattr(node.target, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    for name in {"train", "training"}.intersection(names):
        path = free_name(program, f"{node.name}_mode")
        program.add_submodule(path, _InTraining())
        with program.graph.inserting_before(node):
            node.update_arg(names.index(name), program.graph.call_module(path))


def _forget_mode(mode: fx.Node) -> None:
    """Undo `_tell_mode`."""
    for user in list(mode.users):
        user.args = tuple(False if each is mode else each for each in user.args)


def trained(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy of a prepared program that was trained and frozen, as one that was calibrated.

    Nothing drops in it, and what was scaled by a BatchNorm is a layer with one weight and one bias.
    """
    prepared = structural_copy(prepared)
    for node in list(prepared.graph.nodes):
        if DROPS in node.meta:
            node.replace_all_uses_with(node.args[0])
        elif _OPERATOR in node.meta:
            scaled = _scaled_layer(node)
            if scaled is None:
                _call_operator(node)
            else:
                _fold(scaled, node, prepared)
        elif node.op == "call_module" and isinstance(module_of(node), _InTraining):
            _forget_mode(node)
    _finish(prepared)
    return prepared


def _scaled_layer(norm: fx.Node) -> fx.Node | None:
    """The operator whose weight is scaled by a BatchNorm, which reads its result."""
    node: Any = norm
    while isinstance(node, fx.Node) and node.meta.get(SITE) == norm.meta.get(SITE):
        weight: Any = weight_of(node)
        if weight is not None:
            return node if weight.op == "call_module" and weight.args[0].op != "get_attr" else None
        node = node.args[0] if node.args else None
    return None


def _fold(layer: fx.Node, norm: fx.Node, prepared: fx.GraphModule) -> None:
    """Give a layer the weight and the bias that it has with its BatchNorm, in place."""
    observed = weight_of(layer)
    assert observed is not None
    with torch.no_grad():
        weight = _value(observed.args[0], prepared, {})
        nothing = torch.zeros(1, len(weight), *[1] * (weight.dim() - 2))
        bias = _value(norm, prepared, {layer: nothing}).flatten()
    with prepared.graph.inserting_before(observed):
        observed.args = (_stored(prepared, f"{layer.name}_weight", weight),)
    with prepared.graph.inserting_before(layer):
        own = _stored(prepared, f"{layer.name}_bias", bias)
        layer.args = (*layer.args[:2], own, *layer.args[3:])
    norm.replace_all_uses_with(layer)


def _stored(prepared: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    prepared.register_parameter(name, nn.Parameter(value))
    return prepared.graph.get_attr(name)


def _value(argument: Any, program: fx.GraphModule, known: dict[fx.Node, Tensor]) -> Any:
    """What a node gives that depends on stored tensors and on known results."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument in known:
        return known[argument]
    if argument.op == "get_attr":
        return stored(argument)
    args = [
        fx.node.map_arg(each, lambda node: _value(node, program, known)) for each in argument.args
    ]
    if argument.op == "call_module":
        return module_of(argument)(*args)
    assert callable(argument.target)
    return argument.target(*args)


def _call_operator(node: fx.Node) -> None:
    """Undo `_call_norm`."""
    target, rest = node.meta.pop(_OPERATOR)
    with node.graph.inserting_before(node):
        args = [node.graph.get_attr(each) if isinstance(each, _Stored) else each for each in rest]
    node.op, node.target, node.args = "call_function", target, (node.args[0], *args)


def _finish(program: fx.GraphModule) -> None:
    program.graph.eliminate_dead_code()
    program.recompile()
