"""The sites of a program side by side, each reading what it reads in the program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.artifact.export.integer_kernels import kernel_before
from qrecipe.execution.watched import Watched
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.call import Inputs
from qrecipe.model.nested import cloned


@dataclass(frozen=True, slots=True)
class Apart:
    """A graph with a result for each site, arguments for it, and what the program has there.

    ``unrounded`` are the same results before they are rounded, None where XNNPACK adds integers.
    ``steps`` are the distances between two values that a result can take, None if it is float.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    sites: tuple[str, ...]
    expected: tuple[Tensor, ...]
    unrounded: tuple[Tensor | None, ...]
    steps: tuple[float | None, ...]


def apart(program: fx.GraphModule, inputs: Inputs) -> Apart:
    """The sites that give a floating-point tensor."""
    given = _results(program)
    results = {name: _rounded(node) for name, node in given.items()}
    cut = _Cut()
    outputs = tuple(cut.copied(node, name) for name, node in results.items())
    cut.graph.output(outputs)
    wanted, values = {*cut.inputs, *results.values(), *given.values()}, dict[fx.Node, Any]()

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        if node in wanted:
            values[node] = cloned(result)  # before others write to it

    with torch.no_grad():
        inputs.cloned().call(Watched(program, see))
    return Apart(
        fx.GraphModule(program, cut.graph),
        tuple(cloned(values[node]) for node in cut.inputs),
        tuple(results),
        tuple(values[node] for node in results.values()),
        tuple(None if _is_whole(results[name]) else values[node] for name, node in given.items()),
        tuple(map(_step, results.values())),
    )


def _results(program: fx.GraphModule) -> dict[str, fx.Node]:
    """The last operator of each site."""
    found: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        name = site_of(node)
        is_operator = node.op == "call_function" and not is_conversion(node)
        value = node.meta.get("val") if is_operator else None
        if name is not None and isinstance(value, Tensor) and value.is_floating_point():
            found[name] = node
    return found


def _rounded(node: fx.Node) -> fx.Node:
    """The result as its reader gets it: rounded, or as it is."""
    users = list(node.users)
    if len(users) != 1 or not is_conversion(users[0]):
        return node
    return next(iter(users[0].users), node)


def _is_whole(result: fx.Node) -> bool:
    return is_conversion(result) and kernel_before(result.all_input_nodes[0]) is not None


def _step(result: fx.Node) -> float | None:
    scale = result.args[1] if is_conversion(result) else None
    return scale if isinstance(scale, float) else None


class _Cut:
    """A graph of copied sites, each with inputs of its own for what others compute."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []

    def copied(self, result: fx.Node, site: str) -> fx.Node:
        copies: dict[fx.Node, fx.Node] = {}

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                is_copied = _belongs(node, site)
                copies[node] = self.graph.node_copy(node, copy) if is_copied else self._given(node)
            return copies[node]

        return copy(result)

    def _given(self, node: fx.Node) -> fx.Node:
        self.inputs.append(node)
        return self.graph.placeholder(f"given_{len(self.inputs)}")


def _belongs(node: fx.Node, site: str) -> bool:
    """Whether a node is a stored tensor, computes for the site, or rounds for it."""
    if node.op == "get_attr":
        return True
    if not is_conversion(node):
        return site_of(node) == site
    source = node.all_input_nodes[0]  # of a dequantize: a quantize, or stored integers
    return source.op == "get_attr" or is_conversion(source) or site_of(source) == site
