"""Outputs of a graph other than tensors: constants, and containers of custom classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from qrecipe.model.nested import Packing, leaves, map_leaves, parts_of, tensors_in
from qrecipe.model.trace_proof import Value


def name_constants(graph_module: fx.GraphModule) -> None:
    """Make each constant that the graph returns the result of a call, in place.

    torch inserts observers after the outputs, and only accepts tensors and None.
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

    output.args = (map_leaves(named, output.args[0]),)


def restore_constants(graph_module: fx.GraphModule) -> bool:
    """Undo `name_constants`, in place; whether there were any."""
    constants = [node for node in graph_module.graph.nodes if node.target is _constant]

    def restored(leaf: Any) -> Any:
        is_constant = isinstance(leaf, fx.Node) and leaf.target is _constant
        return leaf.args[0] if is_constant else leaf

    output = graph_module.graph.output_node()
    output.args = (map_leaves(restored, output.args[0]),)
    for node in constants:
        graph_module.graph.erase_node(node)
    return bool(constants)


def return_tensors(graph_module: fx.GraphModule) -> None:
    """Make the graph return the tensors of its outputs as one flat tuple, in place."""
    graph = graph_module.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        tensors = graph.call_function(_tensors, (tuple(_unpacked(output.args[0])),))
    output.args = (tensors,)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _tensors(values: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Without numbers, as of samples, and what a program's own containers hold besides tensors."""
    return tuple(tensors_in(values))


def _unpacked(value: Any) -> Iterator[fx.Node]:
    """The nodes in an argument, including those in packed containers."""
    for leaf in leaves(value):
        if isinstance(leaf, fx.Node) and is_packing(leaf):
            yield from _unpacked((leaf.args, leaf.kwargs))
        elif isinstance(leaf, fx.Node):
            yield leaf


def output_names(output: Any) -> Iterator[str | None]:
    """For each tensor of an output, in order, its keys, fields and positions, joined by dots.

    None for a tensor that has positions alone.
    """
    for path in _paths_of_tensors(output, ()):
        name = ".".join(map(str, path))
        yield name if any(isinstance(key, str) for key in path) and name else None


def _paths_of_tensors(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, Tensor):
        yield path
    parts = parts_of(value) or {}
    keys = getattr(value, "_fields", parts)  # of a named tuple
    for key, part in zip(keys, parts.values(), strict=True):
        yield from _paths_of_tensors(part, (*path, key))


def is_packing(node: fx.Node) -> bool:
    """Whether the node only packs results into a container of a custom class."""
    return node.op == "call_function" and isinstance(node.target, (type, Packing))


def _constant(value: Any) -> Any:
    return value
