"""A float graph that runs once, and then for each site only from that site on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from qrecipe.model.nested import tensors_in

Values = dict[fx.Node, Any]


@dataclass(frozen=True, slots=True)
class Suffix:
    """What has to run again when the result of a node changes: its descendants, in order.

    ``reads`` are the other float values that they need; ``dead_after`` has, for each step, the
    values that no later step reads.
    """

    steps: tuple[fx.Node, ...]
    reads: frozenset[fx.Node]
    dead_after: tuple[tuple[fx.Node, ...], ...]


class FloatGraph:
    """A graph of float operations, run node by node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.nodes: list[fx.Node] = list(graph_module.graph.nodes)
        self.output = self.nodes[-1]
        self._interpreter = fx.Interpreter(graph_module, garbage_collect_values=False)
        self._placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self._needed = _ancestors(self.output)
        self._dead_after = _dead_after(self.nodes, set(self.nodes))

    def suffix(self, start: fx.Node) -> Suffix:
        """What depends on ``start``, as far as the output depends on it.

        If the output does not, the suffix is empty and reads the output itself.
        """
        changed = {start}
        steps = []
        for node in self.nodes:
            if node in self._needed and any(source in changed for source in node.all_input_nodes):
                changed.add(node)
                steps.append(node)
        if self.output not in changed:
            return Suffix((), frozenset({self.output}), ())
        sources = {source for step in steps for source in step.all_input_nodes}
        return Suffix(tuple(steps), frozenset(sources - changed), _dead_after(steps, changed))

    def run(self, inputs: Sequence[Any], keep: Callable[[fx.Node], bool]) -> Values:
        """Run everything; return the values of the nodes that ``keep`` selects, and the output."""
        values: Values = {}
        given = dict(zip(self._placeholders, inputs, strict=True))
        for node, dead in zip(self.nodes, self._dead_after, strict=True):
            values[node] = given[node] if node in given else self._result(node, values)
            for source in dead:
                if not keep(source):
                    del values[source]
        return values

    def sizes(self, inputs: Sequence[Any]) -> dict[fx.Node, int]:
        """Bytes of each node's value for such inputs; stored parameters don't count."""
        values = self.run(inputs, lambda node: True)
        return {n: 0 if n.op == "get_attr" else size_of(value) for n, value in values.items()}

    def peak(self, suffix: Suffix, start: fx.Node, sizes: Mapping[fx.Node, int]) -> int:
        """The peak of bytes that replaying a suffix holds, besides what it reads."""
        held = most = sizes[start]
        for node, dead in zip(suffix.steps, suffix.dead_after, strict=True):
            held += sizes[node]
            most = max(most, held)
            held -= sum(sizes[source] for source in dead)
        return most

    def replay(self, suffix: Suffix, start: fx.Node, value: Any, cached: Values) -> Any:
        """The output with ``value`` as the result of ``start``."""
        values = {node: cached[node] for node in suffix.reads}
        values[start] = value
        for node, dead in zip(suffix.steps, suffix.dead_after, strict=True):
            values[node] = self._result(node, values)
            for source in dead:
                del values[source]
        return values[self.output]

    def _result(self, node: fx.Node, values: Values) -> Any:
        """What a node gives for the values of others."""
        self._interpreter.env = values
        return self._interpreter.run_node(node)


def _dead_after(steps: Sequence[fx.Node], own: set[fx.Node]) -> tuple[tuple[fx.Node, ...], ...]:
    """For each step, the nodes of ``own`` that it is the last to read."""
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        for source in step.all_input_nodes:
            if source in own:
                last[source] = index
    dead: list[list[fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        dead[index].append(node)
    return tuple(map(tuple, dead))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def size_of(value: Any) -> int:
    """Bytes of the tensors in a value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))
