"""Calls that only return their input: dropouts in eval mode, identities, stochastic depth."""

from __future__ import annotations

from torch import fx, nn

from qrecipe._torch_ao import DeQuantStub, QuantStub
from qrecipe.model.addresses import members_of
from qrecipe.model.altered_modules import alteration
from qrecipe.model.switches import arguments, flag
from qrecipe.rules.structure import Member

_IDENTITIES = (nn.Identity, QuantStub, DeQuantStub)


def drop_no_ops(graph_module: fx.GraphModule, is_trained: bool) -> tuple[Member, ...]:
    """Remove the calls that return their input unchanged, in place; returns them.

    If the graph ``is_trained``, modules that drop in training mode stay.
    """
    removed: list[Member] = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            does_nothing = _does_nothing(graph_module.get_submodule(node.target), is_trained)
        else:
            does_nothing = node.meta["value"].is_input and _drops_nothing(node)
        if does_nothing:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
            removed += members_of(node)
    return tuple(removed)


def _does_nothing(module: nn.Module, is_trained: bool) -> bool:
    if alteration(module) is not None:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        is_torchs_own = type(module).__module__ == nn.modules.dropout.__name__
        return is_torchs_own and (not is_trained or module.p == 0)
    return type(module) in _IDENTITIES


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a function that returned its input would only do anything else in training mode."""
    return flag(node) is False or arguments(node).get("p") == 0
