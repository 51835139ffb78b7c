"""Whether two graphs make the same calls, told without running them."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from qrecipe._torch_ao import is_observer
from qrecipe.model.nodes import module_of

Passes = Callable[[fx.Node], bool]
"""Whether a node counts as one that returns its first input."""


def same_calls(graph: fx.Graph, other: fx.Graph, passes: Passes, other_passes: Passes) -> bool:
    """Whether the graphs make the same calls in the same order, but for nodes that pass.

    False proves nothing: graphs that differ may compute the same.
    """
    own, others = _calls(graph, passes), _calls(other, other_passes)
    if len(own) != len(others):
        return False
    twins: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(own, others, strict=True):
        twins[twin] = node
        if (node.op, node.target) != (twin.op, twin.target):
            return False
        given = fx.map_arg((node.args, node.kwargs), lambda each: _source(each, passes))
        asked = fx.map_arg(
            (twin.args, twin.kwargs), lambda each: twins.get(_source(each, other_passes))
        )
        if given != asked:
            return False
    return True


def observes(node: fx.Node) -> bool:
    """Whether a node of a prepared graph observes or fake-quantizes."""
    return is_observer(module_of(node))


def _calls(graph: fx.Graph, passes: Passes) -> list[fx.Node]:
    """All nodes except those that pass, and the parameters of these."""
    return [
        node
        for node in graph.nodes
        if not passes(node)
        and not (node.op == "get_attr" and node.users and all(map(passes, node.users)))
    ]


def _source(node: fx.Node, passes: Passes) -> fx.Node:
    while passes(node):
        node = node.all_input_nodes[0]
    return node
