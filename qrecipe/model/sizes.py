"""Which nodes are numbers or shapes, whatever tensors a graph is given."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from qrecipe.model.rewrites.shape_readers import reads_shape

_ARITHMETIC = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.pow),
    *(operator.neg, operator.pos, operator.abs),
)


def kind_of(node: fx.Node) -> type[int | float | torch.Size] | None:
    """The class of a size, of a shape, or of what is computed from sizes; None for all else."""
    if reads_shape(node):
        gives_all = node.target == "size" and len(node.args) + len(node.kwargs) == 1
        return torch.Size if gives_all or "shape" in node.args[1:] else int
    if node.op != "call_function":
        return None
    kinds = {kind_of(each) if isinstance(each, fx.Node) else type(each) for each in node.args}
    if node.target is operator.getitem:
        if kind_of(node.args[0]) is not torch.Size:  # type: ignore[arg-type]
            return None
        return torch.Size if isinstance(node.args[1], slice) else int
    if node.target in (len, math.floor, math.ceil) and None not in kinds:
        return int
    if not kinds <= {int, float, bool}:
        return None
    if node.target is operator.truediv:
        return float
    if node.target in _ARITHMETIC:
        return float if float in kinds else int
    return None
