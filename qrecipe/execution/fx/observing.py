"""Which tensors of a prepared graph are observed, where torch's ``prepare`` needs correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from qrecipe.execution.clamped import Clamped
from qrecipe.model.addresses import DROPS, site_of
from qrecipe.model.moving import moved
from qrecipe.model.nodes import module_of
from qrecipe.model.same_graph import observes
from qrecipe.planning.plan import Limits

OBSERVED = "_observed_graph_module_attrs"
"""Where torch keeps, in the ``meta`` of a prepared graph, what it converts it by."""


def observe_before_drops(prepared: fx.GraphModule) -> None:
    """Let what drops read a quantized tensor instead of having its result quantized, in place.

    The rest of a dropout is scaled up, which would widen the range.
    """
    drops = [node for node in prepared.graph.nodes if DROPS in node.meta]
    for node in reversed(drops):
        source = node.all_input_nodes[0]
        observers = [user for user in node.users if observes(user) and not _is_dynamic(user)]
        if not observers:
            continue
        if not observes(source):
            if len(observers) < len(node.users):
                continue  # someone reads it as float, or rounds it as it comes
            before = next(filter(observes, source.users), observers[0])
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


def _is_dynamic(observer: fx.Node) -> bool:
    """Whether it belongs to a layer that rounds its input itself."""
    return bool(getattr(module_of(observer), "is_dynamic", False))


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


def observe_moved_once(prepared: fx.GraphModule) -> None:
    """Remove the observers of moved numbers that their input has as well, in place.

    The parts of a tensor share its observer, but are narrower: observed as well, they would narrow
    a moving average, and the whole would be clipped. torch's conversion, however, wants an observer
    at every output.
    """
    nodes = _moves(prepared)
    for node in reversed(nodes):
        source = before_drops(node.all_input_nodes[0])
        if not observes(source):
            continue
        shared = module_of(source)
        for user in list(node.users):
            if observes(user) and module_of(user) is shared:
                user.replace_all_uses_with(node)
                prepared.graph.erase_node(user)
                prepared.delete_submodule(str(user.target))
    if nodes:
        prepared.recompile()


def observe_moved_again(prepared: fx.GraphModule) -> None:
    """Put the observers back that `observe_moved_once` removed, in place."""
    nodes = _moves(prepared)
    qconfigs = prepared.meta[OBSERVED].node_name_to_qconfig
    for node in nodes:
        source, readers = before_drops(node.all_input_nodes[0]), list(node.users)
        if not observes(source) or qconfigs.get(node.name) is None:
            continue
        shared = module_of(source)
        # a dynamic layer has an observer of its own before it
        if any(observes(user) and module_of(user) is shared for user in readers):
            continue
        with prepared.graph.inserting_after(node):
            again = prepared.graph.call_module(str(source.target), (node,))
        for reader in readers:
            reader.replace_input_with(node, again)
    if nodes:
        prepared.recompile()


def _moves(prepared: fx.GraphModule) -> list[fx.Node]:
    return [node for node in prepared.graph.nodes if node.target is moved]


def observe_clamped(prepared: fx.GraphModule, clamps: Mapping[str, Limits]) -> None:
    """Let the observers of some sites' results see them between limits, in place."""
    for node in prepared.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        limits = clamps.get(site_of(source) or "") if isinstance(source, fx.Node) else None
        if limits is not None and observes(node):
            prepared.set_submodule(str(node.target), Clamped(module_of(node), limits))


def share_connected_observers(prepared: fx.GraphModule) -> None:
    """Merge all observers that are connected by copying operations, in place."""
    groups: dict[nn.Module, set[str]] = {}
    for node in prepared.graph.nodes:
        info = node.meta.get("target_dtype_info") or {}
        if not info.get("input_output_share_observers"):
            continue
        names = set(_observer_names(node))
        if not any(user.target in names for user in node.users):
            continue  # its output is not observed: it stays float
        merged: set[str] = set()
        for name in names:
            group = groups.setdefault(prepared.get_submodule(name), set())
            group.add(name)
            if group is not merged:
                smaller, merged = sorted((merged, group), key=len)
                merged |= smaller
                groups |= {prepared.get_submodule(name): merged for name in smaller}
    for names in {id(names): names for names in groups.values()}.values():
        first = prepared.get_submodule(min(names))
        for name in names:
            prepared.set_submodule(name, first)


def _observer_names(node: fx.Node) -> Iterator[str]:
    """The observers of a node's inputs and of its output."""
    for other in (*map(before_drops, node.all_input_nodes), *node.users):
        if observes(other):
            yield str(other.target)
