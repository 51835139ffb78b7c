"""Numbers that are moved are observed once, where they come from.

The parts of a tensor share its observer, but are narrower: observed as well, they would narrow a
moving average, and the whole would be clipped. torch's conversion, however, wants an observer at
every output.
"""

from __future__ import annotations

from torch import fx

from qrecipe._torch_ao import is_observer
from qrecipe.model.moving import moved


def observe_moved_once(prepared: fx.GraphModule) -> None:
    """Remove the observers of moved numbers that their input has as well, in place."""
    for node in reversed(prepared.graph.nodes):
        if node.target is not moved or not _is_observed(node.args[0], prepared):
            continue
        shared = prepared.get_submodule(str(node.args[0].target))
        for user in list(node.users):
            if _is_observed(user, prepared) and prepared.get_submodule(str(user.target)) is shared:
                user.replace_all_uses_with(node)
                prepared.graph.erase_node(user)
                prepared.delete_submodule(str(user.target))
    prepared.recompile()


def observe_moved_again(prepared: fx.GraphModule) -> None:
    """Put the observers back that `observe_moved_once` removed, in place."""
    qconfigs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in list(prepared.graph.nodes):
        if node.target is not moved or qconfigs.get(node.name) is None:
            continue
        source = node.args[0]
        if _is_observed(source, prepared):
            readers = list(node.users)
            with prepared.graph.inserting_after(node):
                again = prepared.graph.call_module(str(source.target), (node,))
            for reader in readers:
                reader.replace_input_with(node, again)
    prepared.recompile()


def _is_observed(node: fx.Node, prepared: fx.GraphModule) -> bool:
    return node.op == "call_module" and is_observer(prepared.get_submodule(str(node.target)))
