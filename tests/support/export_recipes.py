"""Recipes for backends that are exported to, a net and its batches."""

from __future__ import annotations

import torch
from torch import nn

EXECUTORCH = """
format = 1
backend = "executorch"
[tensor.weight]
observer = "per_channel_minmax"
dtype = "int8"
qscheme = "per_channel_symmetric"
quant_min = -127
eps = 0.000244140625
quant_max = 127
[tensor.activation]
observer = "moving_average_minmax"
dtype = "int8"
qscheme = "per_tensor_affine"
eps = 0.000244140625
[qconfig.int8]
weight = "weight"
activation = "activation"
[rules]
global = "int8"
"""
TENSORRT = EXECUTORCH.replace("executorch", "tensorrt").replace(
    "per_tensor_affine", "per_tensor_symmetric"
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(12)]
