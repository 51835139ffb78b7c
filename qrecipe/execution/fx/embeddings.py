"""Embeddings in integers as plain functions, for exporters.

Their zero points are no integers. torch's decomposed conversion rounds each weight before it adds
one, which is up to a step off, and ONNX has integer zero points only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe._torch_fx import ReferenceQuantizedModule
from qrecipe.execution.packing import one_each


def look_up_integers(decomposed: fx.GraphModule) -> None:
    """Let embeddings look up the integers of the kernels, in place."""
    for name, module in list(decomposed.named_modules()):
        if not isinstance(module, ReferenceQuantizedModule) or not _has_float_zero_points(module):
            continue
        if isinstance(module, nn.Embedding):
            decomposed.set_submodule(name, _Table(module))
        else:  # sums of rows
            module.table = _Table(module)
            vars(module)["get_weight"] = module.table.all


def _has_float_zero_points(module: Any) -> bool:
    return bool(module.weight_qscheme == torch.per_channel_affine_float_qparams)


class _Table(nn.Module):
    """The integers of an embedding, with a scale and a zero point for each row."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, reference: Any) -> None:
        super().__init__()
        scale, zero_point = reference.weight_scale, reference.weight_zero_point
        weight, kind = reference.weight.detach(), reference.weight_dtype
        quantized = torch.quantize_per_channel(weight, scale, zero_point, 0, kind)
        self.register_buffer("codes", one_each(quantized.int_repr(), weight.shape))
        self.register_buffer("scale", scale.view(-1, 1))
        self.register_buffer("zero_point", zero_point.view(-1, 1))

    def forward(self, indices: Tensor) -> Tensor:
        codes = F.embedding(indices, self.codes).float()
        return (codes - F.embedding(indices, self.zero_point)) * F.embedding(indices, self.scale)

    def all(self) -> Tensor:
        # an exporter would fold plain arithmetic into floats
        grid = (self.scale.flatten(), torch.zeros(len(self.scale), dtype=torch.int64), 0, 0, 255)
        steps: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, *grid, torch.uint8
        )
        return steps - self.zero_point * self.scale
