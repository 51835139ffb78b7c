"""The shapes of example inputs as plain data, and tensors of these shapes without values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from qrecipe.model.call import Inputs, arguments
from qrecipe.model.nested import leaves, map_leaves, parts_of
from qrecipe.model.record import DType, Shape, Shapes

_NAMES: Mapping[torch.dtype, DType] = {getattr(torch, name): name for name in get_args(DType)}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

MOST_OPERATIONS = 100_000
"""The most operations that forward may make while it is traced or run without values.

The shapes of a stored model come from its file, and forward may make as many as it has elements.
"""

TOO_MANY_OPERATIONS = f"forward makes more than {MOST_OPERATIONS:,} operations"


def shapes_of(module: nn.Module, inputs: Inputs) -> dict[str, Shapes]:
    """The shapes of the tensors that forward is given, by parameter.

    Arguments are left out if anything but dense tensors is in them. Raises ``PlanError`` like
    `call.arguments`.
    """
    found = {name: _shapes(value) for name, value in arguments(module, inputs).items()}
    return {name: shapes for name, shapes in found.items() if shapes is not None}


def _shapes(value: Any) -> Shapes | None:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.dtype not in _NAMES:
            return None
        return Shape(shape=tuple(value.shape), dtype=_NAMES[value.dtype])
    has_names = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if not has_names and not isinstance(value, (tuple, list)):
        return None
    parts = {key: _shapes(part) for key, part in (parts_of(value) or {}).items()}
    known = {key: shapes for key, shapes in parts.items() if shapes is not None}
    if not known or len(known) < len(parts):
        return None
    return known if isinstance(value, dict) else tuple(known.values())


def of_another_batch_size(shapes: Mapping[str, Shapes]) -> dict[str, Shapes] | None:
    """The shapes for one sample of several, or for two; None if they do not form a batch."""
    sizes = {shape.shape[:1] for shape in leaves(shapes)}
    if len(sizes) != 1 or () in sizes:
        return None
    other = 2 if sizes == {(1,)} else 1

    def resized(shape: Shape) -> Shape:
        return shape.model_copy(update={"shape": (other, *shape.shape[1:])})

    return dict(map_leaves(resized, shapes))


def without_values(shapes: Mapping[str, Shapes]) -> dict[str, Any]:
    """Tensors of these shapes on the meta device."""
    return _tensors(shapes, "meta")


def uninitialised(shapes: Mapping[str, Shapes]) -> dict[str, Any]:
    """Tensors of these shapes with arbitrary values."""
    return _tensors(shapes, None)


def _tensors(shapes: Mapping[str, Shapes], device: str | None) -> dict[str, Any]:
    def made(shape: Shape) -> Tensor:
        return torch.empty(shape.shape, dtype=_DTYPES[shape.dtype], device=device)

    return dict(map_leaves(made, shapes))
