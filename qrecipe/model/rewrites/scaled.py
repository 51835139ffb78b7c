"""Layers with a factor and a summand for each output channel in their weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


def scaled(layer: Any, factor: Tensor, shift: Tensor) -> nn.Module:
    """A copy of a layer that gives ``factor`` times its result, plus ``shift``, both (channels).

    A linear layer, a convolution or a BatchNorm in eval mode. The weight of a transposed
    convolution has the output channels of one group in its second dimension.
    """
    made: nn.Module = copy.copy(layer)
    like = layer.running_mean if layer.weight is None else layer.weight
    bias = shift if layer.bias is None else layer.bias * factor + shift
    made._parameters = {
        **layer._parameters,
        "weight": _parameter(_weight(layer, factor), like),
        "bias": _parameter(bias, like),
    }
    if isinstance(layer, _BatchNorm):
        made.affine = True  # type: ignore[assignment]
    return made


def _weight(layer: Any, factor: Tensor) -> Tensor:
    weight: Tensor | None = layer.weight
    if weight is None:
        return factor
    ones = [1] * (weight.dim() - 2)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        by_group = factor.reshape(layer.groups, 1, -1)
        of_inputs = by_group.expand(-1, weight.shape[0] // layer.groups, -1)
        return weight * of_inputs.reshape(*weight.shape[:2], *ones)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(like.dtype), like.requires_grad)
