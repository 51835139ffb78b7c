"""Calls that only return their input: dropouts in eval mode, identities, stochastic depth."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qrecipe.model.addresses import DROPS, members_of
from qrecipe.model.altered_modules import alteration
from qrecipe.model.copies import structural_copy
from qrecipe.model.graph_names import outer
from qrecipe.model.nodes import call_instead, erase_unread, module_of
from qrecipe.model.switches import arguments, flag
from qrecipe.model.trace import InTraining
from qrecipe.model.tracer import RETURNS_INPUT
from qrecipe.rules.structure import Member, joined


def drop_no_ops(
    graph_module: fx.GraphModule, prefix: str, training: InTraining | None
) -> tuple[Member, ...]:
    """Remove the calls that return their input unchanged, in place; returns them.

    ``prefix`` is the path of the graph in the whole model. If it is trained, those that drop in
    ``training`` stay, without an address.
    """
    idle: list[Member] = []
    for node in list(graph_module.graph.nodes):
        module = module_of(node)
        if module is not None:
            if not _does_nothing(node, module):
                continue
            path = joined(prefix, outer(str(node.target)))
            drops = training is not None and path in training.trained and _drops(node, module)
        else:
            drops = training is not None and node.name in training.drops
            if not node.meta["value"].is_input or not (drops or _returns(node)):
                continue
            if drops and training is not None:
                _switch(node, training.drops[node.name])
        idle += members_of(node)
        if drops:
            node.meta = {"value": node.meta["value"], DROPS: True}
        else:
            source, *others = node.all_input_nodes
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            erase_unread(others)  # the dtype that it is cast to
    graph_module.recompile()
    return tuple(idle)


def _does_nothing(node: fx.Node, module: nn.Module) -> bool:
    """Whether a module returned its input: its code always does, or it is one of torch's."""
    is_known = RETURNS_INPUT in node.meta or type(module).__module__.startswith("torch.nn.")
    returned = node.meta["value"].is_input
    return bool(is_known and returned) and alteration(module) is None


def _drops(node: fx.Node, module: nn.Module) -> bool:
    """Whether a module that returns its input in eval mode may do more in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return RETURNS_INPUT in node.meta and not _returns_input(structural_copy(module).train())


def _returns_input(module: nn.Module) -> bool:
    try:
        graph = fx.symbolic_trace(module).graph
    except Exception:
        return False  # a branch on random numbers
    given, *others = graph.nodes
    return [node.args for node in others] == [(given,)]


_CASTS = ("float", "to", "type", "type_as")


def _returns(node: fx.Node) -> bool:
    """Whether a call that returned its input will do so again, in eval mode.

    A cast does, except for inputs of the model: those may have other types.
    """
    if node.op == "call_method":
        return node.target in _CASTS and node.all_input_nodes[0].op != "placeholder"
    return flag(node) is False or arguments(node).get("p") == 0


class _Switched(nn.Module):
    """A function that is called in training mode; ``name`` is its input's if that is a keyword."""

    def __init__(
        self, function: Any, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.function, self.name, self.args, self.kwargs = function, name, args, kwargs

    def forward(self, x: Any) -> Any:
        if not self.training:
            return x
        if self.name is None:
            return self.function(x, *self.args, **self.kwargs)
        return self.function(*self.args, **{**self.kwargs, self.name: x})


def _switch(node: fx.Node, in_training: fx.Node) -> None:
    """Turn a function into a module that calls it as in training mode, in place."""
    kwargs = dict(in_training.kwargs)
    name = next((key for key, value in kwargs.items() if isinstance(value, fx.Node)), None)
    args = in_training.args if name else in_training.args[1:]
    kwargs.pop(name or "", None)
    module = _Switched(node.target, name, args, kwargs)
    call_instead(node, module, node.all_input_nodes[0])
