"""Numbers that are moved are observed once, where they come from.

The parts of a tensor share its observer, but are narrower: observed as well, they would narrow a
moving average, and the whole would be clipped. torch's conversion, however, wants an observer at
every output.
"""

from __future__ import annotations

from torch import fx

from qrecipe.execution.fx.drops import before_drops
from qrecipe.model.moving import moved
from qrecipe.model.same_graph import observing


def observe_moved_once(prepared: fx.GraphModule) -> None:
    """Remove the observers of moved numbers that their input has as well, in place."""
    nodes = _moves(prepared)
    is_observer = observing(prepared)
    for node in reversed(nodes):
        source = before_drops(node.all_input_nodes[0])
        if not is_observer(source):
            continue
        shared = prepared.get_submodule(str(source.target))
        for user in list(node.users):
            if is_observer(user) and prepared.get_submodule(str(user.target)) is shared:
                user.replace_all_uses_with(node)
                prepared.graph.erase_node(user)
                prepared.delete_submodule(str(user.target))
    if nodes:
        prepared.recompile()


def observe_moved_again(prepared: fx.GraphModule) -> None:
    """Put the observers back that `observe_moved_once` removed, in place."""
    nodes = _moves(prepared)
    is_observer = observing(prepared)
    qconfigs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in nodes:
        source, readers = before_drops(node.all_input_nodes[0]), list(node.users)
        is_shared = is_observer(source) and qconfigs.get(node.name) is not None
        if not is_shared or any(map(is_observer, readers)):
            continue
        with prepared.graph.inserting_after(node):
            again = prepared.graph.call_module(str(source.target), (node,))
        for reader in readers:
            reader.replace_input_with(node, again)
    if nodes:
        prepared.recompile()


def _moves(prepared: fx.GraphModule) -> list[fx.Node]:
    return [node for node in prepared.graph.nodes if node.target is moved]
