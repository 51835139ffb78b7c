"""What a graph computes from the shapes of its inputs alone, while it is being traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.copies import on_meta
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.record import Shape, Shapes
from qrecipe.model.rewrites.shape_readers import reads_shape
from qrecipe.model.shapes import of_another_batch_size, without_values
from qrecipe.process.memory import raise_lack_of_memory

UNKNOWN = object()
"""The value of a node that depends on more than shapes."""

VARIES = object()
"""The value of a node that is another one at another batch size."""


class KnownValues:
    """The values of nodes that follow from the shapes of the inputs, at every batch size.

    They are computed without any data, on the meta device. That a value is the same at every batch
    size is only known for two of them.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        fixed: Mapping[str, Any],
        shapes: Mapping[str, Shape | Shapes],
    ) -> None:
        root = on_meta(root)
        another = of_another_batch_size(shapes)
        self._runs = [
            _Run(root, graph, {**fixed, **without_values(given)})
            for given in (shapes, another)
            if given is not None
        ]

    def of(self, node: fx.Node) -> Any:
        """The value of a node, or UNKNOWN or VARIES."""
        try:
            first, *others = (run.value(node) for run in self._runs)
        except Exception as error:
            raise_lack_of_memory(error)
            return UNKNOWN
        return VARIES if any(other != first for other in others) else first

    def is_sequence(self, node: fx.Node) -> bool:
        """Whether the value of a node is known to have parts by number, at the shapes given."""
        try:
            value = self._runs[0].value(node)
        except Exception as error:
            raise_lack_of_memory(error)
            return False
        return isinstance(value, (tuple, list, Tensor))


_CHUNKS = (torch.chunk, "chunk")
"""What returns as many parts as it is told; how many follows from a shape if that is read."""


def is_from_shapes(node: fx.Node) -> bool:
    """Whether all that a node reads of tensors is their shape, or how many there are."""
    if node.target is len:
        parts = node.all_input_nodes[0]
        return parts.target not in _CHUNKS or len(parts.all_input_nodes) > 1
    if reads_shape(node):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    return all(map(is_from_shapes, node.all_input_nodes))


class _Run(Interpreter):
    """Runs the nodes that a value needs, without values of tensors."""

    def __init__(self, root: nn.Module, graph: fx.Graph, given: Mapping[str, Any]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self._given = given
        with torch.device("meta"):  # torch lists its factories at the first call of one
            torch.empty(0)

    def value(self, node: fx.Node) -> Any:
        with torch.no_grad(), torch.device("meta"):
            return super().value(node)

    def placeholder(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._given[target]

    def get_attr(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        found = super().get_attr(target, tuple(args), dict(kwargs))
        return found.to("meta") if isinstance(found, Tensor) else found
