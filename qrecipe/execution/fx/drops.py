"""Calls that drop in training mode alone: no operation, no range and no boundary of their own."""

from __future__ import annotations

from torch import fx

from qrecipe.model.addresses import DROPS
from qrecipe.model.same_graph import observing


def observe_before_drops(prepared: fx.GraphModule) -> None:
    """Let what drops read a quantized tensor instead of having its result quantized, in place.

    The rest of a dropout is scaled up, which would widen the range.
    """
    is_observer = observing(prepared)
    drops = [node for node in prepared.graph.nodes if DROPS in node.meta]
    for node in reversed(drops):
        source = node.all_input_nodes[0]
        observers = [user for user in node.users if is_observer(user)]
        if not observers:
            continue
        if not is_observer(source):
            if len(observers) < len(node.users):
                continue  # someone reads it as float
            before = next(filter(is_observer, source.users), observers[0])
            min(node, *before.users).prepend(before)
            before.replace_input_with(node, source)
            node.replace_input_with(source, before)
        for observer in observers:
            observer.replace_all_uses_with(node, lambda user, node=node: user is not node)
            if not observer.users:
                prepared.graph.erase_node(observer)
                prepared.delete_submodule(str(observer.target))
    if drops:
        prepared.graph.lint()
        prepared.recompile()


def before_drops(node: fx.Node) -> fx.Node:
    """What a node gives in eval mode: itself, or what the drops that it ends read."""
    while DROPS in node.meta:
        node = node.all_input_nodes[0]
    return node


def remove_drops(prepared: fx.GraphModule) -> None:
    """Remove them for conversion, in place."""
    drops = [node for node in prepared.graph.nodes if DROPS in node.meta]
    for node in drops:
        node.replace_all_uses_with(node.all_input_nodes[0])
        prepared.graph.erase_node(node)
    if drops:
        prepared.recompile()
