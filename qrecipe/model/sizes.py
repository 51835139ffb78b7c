"""Which nodes are numbers or shapes, whatever tensors a graph is given."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qrecipe.model.rewrites.shape_readers import reads_shape

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
