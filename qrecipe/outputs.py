"""What a graph returns beside tensors: constants, and containers with a class of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from qrecipe.values import Value


def name_constants(graph_module: fx.GraphModule) -> None:
    """Let each constant that the graph returns be the result of a call, in place.

    torch inserts observers behind what is returned, and takes tensors and None alone.
    """
    graph = graph_module.graph
    output = graph.output_node()

    def named(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, fx.Node):
            return leaf
        with graph.inserting_before(output):
            node = graph.call_function(_constant, (leaf,))
        node.meta["value"] = Value(False, False)
        return node

    output.args = (_mapped(output.args[0], named),)


def restore_constants(graph_module: fx.GraphModule) -> None:
    """Undo `name_constants`, in place."""

    def restored(leaf: Any) -> Any:
        is_constant = isinstance(leaf, fx.Node) and leaf.target is _constant
        return leaf.args[0] if is_constant else leaf

    output = graph_module.graph.output_node()
    output.args = (_mapped(output.args[0], restored),)
    for node in list(graph_module.graph.nodes):
        if node.target is _constant:
            graph_module.graph.erase_node(node)


def is_packing(node: fx.Node) -> bool:
    """Whether the node only puts results into a container of a class of its own."""
    return node.op == "call_function" and isinstance(node.target, type)


def _constant(value: Any) -> Any:
    return value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return immutable_list([_mapped(part, change) for part in value])
    if isinstance(value, dict):
        return immutable_dict({key: _mapped(part, change) for key, part in value.items()})
    return change(value)
