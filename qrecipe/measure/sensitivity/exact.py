"""The exact effect of each site on the output: the rest of the model runs again for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from qrecipe.errors.findings import ExecutionError
from qrecipe.execution.isolated import Isolated, Kernel, WrappedPart
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import tensors_in


def rerun(isolated: Isolated, inputs: Inputs, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The output with each of these sites alone quantized, from a run of the whole model each."""
    for lone in isolated.sites:
        if lone.site.name not in names:
            continue
        with lone.replaced(isolated.kernels[lone.site.name]):
            output = inputs.call(isolated.float_model)
        yield lone.site.name, output


class Replay:
    """Runs the part of the graph after each site, starting from kept float activations.

    If they don't fit into ``memory_limit`` bytes, sites are processed in groups, with one float run
    per group.
    """

    def __init__(self, part: WrappedPart, kernels: Mapping[str, Kernel], memory_limit: int) -> None:
        self._part = part
        self._graph = FloatGraph(part.graph_module)
        self._kernels = kernels
        self._limit = memory_limit
        self._suffixes = {name: self._graph.suffix(node) for name, node in part.nodes.items()}
        self._groups: tuple[int | None, list[list[str]]] | None = None

    def outputs(self, inputs: Inputs, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """The output with each of these sites alone quantized."""
        bound = self._bound(inputs)
        for each in self._groups_for(inputs):
            group = [name for name in each if name in names]
            if not group:
                continue
            needed = set().union(*map(self._needs, group))
            kept = self._graph.run(bound, needed.__contains__)
            for name in group:
                node = self._part.nodes[name]
                value = self._kernels[name](*fx.map_arg(node.args, kept.__getitem__))
                yield name, self._graph.replay(self._suffixes[name], node, value, kept)

    def _bound(self, inputs: Inputs) -> tuple[Any, ...]:
        return bind(self._part.graph_module, self._part.graph_module, inputs)

    def _needs(self, name: str) -> frozenset[fx.Node]:
        return self._suffixes[name].reads | set(self._part.nodes[name].all_input_nodes)

    def _groups_for(self, inputs: Inputs) -> list[list[str]]:
        """Sites in order, as many at a time as fit; recomputed for batches of another size."""
        size = inputs.batch_size
        if self._groups is None or self._groups[0] != size or size is None:
            self._groups = (size, self._find_groups(self._sizes(inputs, size)))
        return self._groups[1]

    def _find_groups(self, sizes: Mapping[fx.Node, int]) -> list[list[str]]:
        groups: list[list[str]] = []
        kept: set[fx.Node] = set()
        peak = 0
        for name, node in self._part.nodes.items():
            needs = set(self._needs(name))
            own = self._graph.peak(self._suffixes[name], node, sizes)
            together = sum(map(sizes.__getitem__, kept | needs)) + max(peak, own)
            if together > self._limit or not groups:
                alone = sum(map(sizes.__getitem__, needs)) + own
                if alone > self._limit:
                    raise too_little_memory(f"replaying {name}", alone, self._limit)
                groups.append([])
                kept, peak = set(), 0
            kept |= needs
            peak = max(peak, own)
            groups[-1].append(name)
        return groups

    def _sizes(self, inputs: Inputs, size: int | None) -> Mapping[fx.Node, int]:
        """Bytes of each float value; extrapolated from few samples if each has an equal share."""
        one, two = inputs.first_samples(1), inputs.first_samples(2)
        if two is inputs or size is None:
            return self._graph.sizes(self._bound(inputs))
        try:
            few, more = (self._graph.sizes(self._bound(samples)) for samples in (one, two))
        except Exception:  # the model needs all samples, for whatever reason
            return self._graph.sizes(self._bound(inputs))
        if any(more[node] not in (count, 2 * count) for node, count in few.items()):
            return self._graph.sizes(self._bound(inputs))
        return {n: count if more[n] == count else size * count for n, count in few.items()}


def too_little_memory(what: str, needed: int, limit: int) -> ExecutionError:
    """The error for a ``memory_limit`` that is too small even for one step (QR424)."""
    return ExecutionError.of(
        "QR424",
        f"{what} needs {needed:,} bytes of activations, but memory_limit is {limit:,}",
        hint="raise memory_limit, or pass smaller batches",
    )


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
        self._interpreter = Interpreter(graph_module, garbage_collect_values=False)
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
