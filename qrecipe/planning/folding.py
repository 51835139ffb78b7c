"""A BatchNorm folded into the transposed convolution before it, as torch should do it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def fold_into_transposed(is_qat: bool, convolution: Any, norm: Any) -> nn.Module:
    """Fold the BatchNorm in eval mode; a ``fuser_method`` for torch.

    The weight has the output channels of one group in its second dimension. torch's own method
    scales it as if it had those of all groups, and fails if there are several.
    """
    assert not is_qat, "in training the two stay separate"
    weight, groups = convolution.weight, convolution.groups
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    by_group = factor.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    by_input = by_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    bias = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    folded: nn.Module = copy.copy(convolution)
    folded._parameters = {
        "weight": nn.Parameter((weight * by_input).detach(), weight.requires_grad),
        "bias": nn.Parameter((bias * factor + norm.bias).detach(), weight.requires_grad),
    }
    return folded
