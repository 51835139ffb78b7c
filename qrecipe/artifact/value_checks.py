"""Checks that kernels can work with the scales, zero points, weights and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qrecipe.artifact.state import Slot, roles_of

_ANY_8_BITS = (-128, 255)


def value_problems(
    model: nn.Module, slots: Sequence[Slot], tensors: Mapping[str, Tensor]
) -> list[str]:
    """The values in a model's slots that no kernel can work with."""
    checks = {"scale": _scale, "zero point": _zero_point, "operand": _operand}
    return [
        f"{problem} in {name}"
        for name, role in roles_of(model, slots).items()
        for problem in checks[role](name, tensors)
    ]


def _scale(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    scale = tensors[name].float()  # as kernels read it
    if not bool(torch.isfinite(scale).all()):
        yield "a scale that is not finite"
    elif not bool((scale > 0).all()):
        yield "a scale that is not positive"


def _zero_point(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    zero_point = tensors[name]
    if zero_point.is_floating_point():  # of embeddings
        if not bool(torch.isfinite(zero_point).all()):
            yield "a zero point that is not finite"
        return
    of_weight = name.endswith("weight_zero_point")
    low, high = _range(tensors.get(name.removesuffix("_zero_point")) if of_weight else None)
    if not bool(((zero_point >= low) & (zero_point <= high)).all()):
        yield f"a zero point outside {low}..{high}"


def _operand(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    if not bool(torch.isfinite(tensors[name]).all()):
        yield "a value that is not finite"


def _range(integers: Tensor | None) -> tuple[int, int]:
    """The limits of the integers that a zero point belongs to; None: those of activations."""
    if integers is None or integers.is_floating_point():
        return _ANY_8_BITS
    limits = torch.iinfo(integers.dtype)
    return limits.min, limits.max
