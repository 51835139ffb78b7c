"""The exact effect of each site on the output: the rest of the model runs again for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from qrecipe.errors.findings import ExecutionError, Finding
from qrecipe.execution.isolated import Isolated, Kernel, WrappedPart
from qrecipe.measure.batches import Call
from qrecipe.measure.sensitivity.replay import FloatGraph
from qrecipe.measure.sensitivity.scores import Score
from qrecipe.model.call import Inputs, batch_size, bind

Tick = Callable[[], None]
"""Called after each site and batch."""


class Rerun:
    """Runs the whole model for each site, for models that are not traced as a whole."""

    def __init__(self, isolated: Isolated) -> None:
        self._isolated = isolated

    def add(self, call: Call, scores: Mapping[str, Score], tick: Tick) -> None:
        """Score each site on one call of the model."""
        for lone in self._isolated.sites:
            lone.put(self._isolated.kernels[lone.site.name])
            try:
                output = call.inputs.call(self._isolated.float_model)
            finally:
                lone.put(lone.original)
            scores[lone.site.name].add(call.output, output)
            tick()


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

    def add(self, call: Call, scores: Mapping[str, Score], tick: Tick) -> None:
        """Score each site on one call of the model."""
        inputs = self._bound(call.inputs)
        for group in self._groups_for(call.inputs):
            needed = set().union(*map(self._needs, group))
            kept = self._graph.run(inputs, needed.__contains__)
            for name in group:
                node = self._part.nodes[name]
                value = self._kernels[name](*fx.map_arg(node.args, kept.__getitem__))
                output = self._graph.replay(self._suffixes[name], node, value, kept)
                scores[name].add(call.output, output)
                tick()

    def _bound(self, inputs: Inputs) -> tuple[Any, ...]:
        return bind(self._part.graph_module, self._part.graph_module, inputs)

    def _needs(self, name: str) -> frozenset[fx.Node]:
        return self._suffixes[name].reads | set(self._part.nodes[name].all_input_nodes)

    def _groups_for(self, inputs: Inputs) -> list[list[str]]:
        """Sites in order, as many at a time as fit; found anew for batches of another size."""
        size = batch_size((inputs.args, dict(inputs.kwargs)))
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
    return ExecutionError(
        Finding(
            "QR424",
            f"{what} needs {needed:,} bytes of activations, but memory_limit is {limit:,}",
            hint="raise memory_limit, or pass smaller batches",
        )
    )
