"""What a graph computes from the shapes of its inputs alone, while it is being traced."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.copies import on_meta
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nodes import reads_shape
from qrecipe.model.record import Shapes
from qrecipe.model.shapes import of_another_batch_size, without_values
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.warnings import filters_kept

UNKNOWN = object()
"""The value of a node that depends on more than shapes."""

VARIES = object()
"""The value of a node that differs at another batch size."""


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
        shapes: Mapping[str, Shapes],
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
            with filters_kept():  # torch imports sympy for what it refuses to compute
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
"""Calls that return as many parts as asked; a shape tells how many only if it is read."""


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


_ARITHMETIC = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.pow),
    *(operator.neg, operator.pos, operator.abs),
)

Kind = type[int | float | torch.Size]


def kind_of(node: fx.Node, kinds: Mapping[Any, Kind]) -> Kind | None:
    """The class of a size, of a shape, or of what is computed from sizes; None for all else.

    ``kinds`` has those of the nodes before it.
    """
    if reads_shape(node):
        gives_all = node.target == "size" and len(node.args) + len(node.kwargs) == 1
        return torch.Size if gives_all or "shape" in node.args[1:] else int
    if node.op != "call_function":
        return None
    given = [kinds.get(each) if isinstance(each, fx.Node) else type(each) for each in node.args]
    if node.target is operator.getitem and given[0] is torch.Size:
        return torch.Size if given[1] is slice else int
    if node.target in (len, math.floor, math.ceil) and given != [None]:
        return int
    if not {int, float, bool}.issuperset(given):
        return None
    if node.target is operator.truediv:
        return float
    if node.target in _ARITHMETIC:
        return float if float in given else int
    return None
