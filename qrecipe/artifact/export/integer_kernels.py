"""What XNNPACK's integer kernels compute, number by number.

Whole numbers in float64 stand for its integers: sums and products of them are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.model.addresses import quantizes_tensor

_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values that a tensor can take: steps of a scale in float32, counted from a zero point.

    Weights have a scale for each channel.
    """

    scale: Tensor
    zero_point: int


@dataclass(frozen=True, slots=True, eq=False)
class OnGrid:
    """A tensor in whole steps from its zero point."""

    steps: Tensor
    grid: Grid


@dataclass(frozen=True, slots=True)
class IntegerKernel:
    """How an operator is computed in integers, where it is, and which clamps are fused into it.

    ``steps`` is given the operator, the grid of its result, and its arguments, the first
    ``operands`` of them as `OnGrid`. It returns the result in steps of its grid.
    """

    steps: Callable[..., Tensor]
    operands: int
    clamps: tuple[str, ...] = ()
    takes: Callable[[fx.Node], bool] = lambda _: True


def kernel_before(rounding: fx.Node) -> fx.Node | None:
    """The operator that XNNPACK computes in integers together with the rounding of its result.

    None for what computes in float and is rounded by a kernel of its own.
    """
    if not quantizes_tensor(rounding):
        return None
    (node,) = rounding.all_input_nodes[:1]
    clamp = _name(node)
    if clamp in _CLAMPS and len(node.users) == 1:
        node = node.all_input_nodes[0]
    kernel = KERNELS.get(node.target)
    if kernel is None or node.kwargs or len(node.users) > 1:
        return None
    is_fused = node is rounding.args[0] or clamp in kernel.clamps
    is_taken = is_fused and all(map(_is_on_grid, node.args[: kernel.operands]))
    return node if is_taken and kernel.takes(node) else None


def _is_on_grid(argument: object) -> bool:
    """Whether an argument is read as numbers on a grid that is known before a call."""
    if not isinstance(argument, fx.Node) or ".dequantize_per_" not in str(argument.target):
        return False
    scale = argument.args[1]
    return not isinstance(scale, fx.Node) or scale.op == "get_attr"


def _layer(
    operator: Any, made: Grid, data: OnGrid, weight: OnGrid, bias: Tensor | None = None, *rest: Any
) -> Tensor:
    products = data.grid.scale * weight.grid.scale
    whole = None if bias is None else (bias / products).double().round()
    sums = operator(data.steps, weight.steps, whole, *rest)
    factor = (products / made.scale).view(-1, *[1] * (weight.steps.dim() - 2))
    rounded: Tensor = (sums.float() * factor).round()
    return rounded


def _sum(_: object, made: Grid, first: OnGrid, second: OnGrid, *, sign: int = 1) -> Tensor:
    """With multipliers of 21 bits; in the middle of two, the higher one."""
    ratios = [each.grid.scale / made.scale for each in (first, second)]
    shift = 21 - int(torch.frexp(torch.stack(ratios).max()).exponent)
    one, other = ((ratio.double() * 2.0**shift).round() for ratio in ratios)
    return ((first.steps * one + sign * second.steps * other) / 2.0**shift + 0.5).floor()


def _product(_: object, made: Grid, first: OnGrid, second: OnGrid) -> Tensor:
    products = first.grid.scale * second.grid.scale
    return ((first.steps * second.steps).float() * (products / made.scale)).round()


def _average(_: object, made: Grid, data: OnGrid, *axes: Any) -> Tensor:
    """The zero points are one float, which is added before rounding."""
    pixels = data.steps[0, 0].numel()
    factor = data.grid.scale / made.scale * torch.tensor(1 / pixels, dtype=torch.float32)
    sums = (data.steps + data.grid.zero_point).sum((2, 3), keepdim=True)
    offset = made.zero_point - pixels * data.grid.zero_point * factor
    return (sums.float() * factor + offset).round() - made.zero_point


def _is_no_square(product: fx.Node) -> bool:
    """XNNPACK squares in float32."""
    return product.args[0] is not product.args[1]


def _is_over_pixels(average: fx.Node) -> bool:
    """Whether an average is one of all pixels of each image, and keeps the dimensions."""
    result = average.meta["val"]
    kept: bool = result.dim() == 4 and result.shape[2:] == (1, 1)
    axes: Any = average.args[1] if average.target is _aten.mean.dim else (2, 3)
    return kept and sorted(axis % 4 for axis in axes) == [2, 3]


def _name(node: fx.Node) -> str:
    """The operator without its overload, and whether it works in place."""
    return str(node.target).rpartition(".")[0].removesuffix("_")


_RELU = ("aten.relu",)
_CLAMPS = (*_RELU, "aten.hardtanh", "aten.relu6")

_LAYER = IntegerKernel(_layer, 2, _CLAMPS)
_SUM = IntegerKernel(_sum, 2, _RELU)
_DIFFERENCE = IntegerKernel(partial(_sum, sign=-1), 2)
_PRODUCT = IntegerKernel(_product, 2, takes=_is_no_square)
_AVERAGE = IntegerKernel(_average, 1, takes=_is_over_pixels)

KERNELS: Mapping[Any, IntegerKernel] = {
    **dict.fromkeys((_aten.conv1d.default, _aten.conv1d.padding, _aten.linear.default), _LAYER),
    **dict.fromkeys((_aten.conv2d.default, _aten.conv2d.padding), _LAYER),
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor), _SUM),
    **dict.fromkeys((_aten.sub.Tensor, _aten.sub_.Tensor), _DIFFERENCE),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul_.Tensor), _PRODUCT),
    **dict.fromkeys((_aten.mean.dim, _aten.adaptive_avg_pool2d.default), _AVERAGE),
}
