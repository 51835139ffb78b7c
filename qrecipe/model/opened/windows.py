"""torchvision's attention in shifted windows, opened into its linear layers.

torchvision computes all of it in one function, which a trace does not look into. Images are
(N, H, W, C), windows (N * windows, tokens, C), as in "Swin Transformer: Hierarchical Vision
Transformer using Shifted Windows" (Liu et al., 2021) and its second version (2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrecipe.model.opened.whole import Whole, class_of_the_caller

_BLOCKED = -100.0
_LARGEST_SCALE = math.log(100.0)


class ShiftedWindowAttention(nn.Module):
    """torchvision's, with the linear layers ``qkv`` and ``proj`` called as such."""

    qkv: nn.Linear
    proj: nn.Linear
    dropout: float
    windows: Windows
    attention: WindowAttention
    merged: Merged

    def forward(self, x: Tensor) -> Tensor:
        kind: Any = class_of_the_caller(self)
        position_bias = kind.get_relative_position_bias(self)
        attended = self.attention(self.qkv(self.windows(x)), x, position_bias)
        projected = F.dropout(self.proj(attended), self.dropout, self.training)
        image: Tensor = self.merged(projected, x)
        return image


def open_windows(module: Any) -> None:
    """Turn torchvision's layer, of either version, into ours, in place."""
    bias = module.qkv.bias
    if hasattr(module, "logit_scale") and bias is not None:  # it ignores the bias of the keys
        q, k, v = bias.detach().chunk(3)
        module.qkv.bias = nn.Parameter(torch.cat([q, torch.zeros_like(k), v]), bias.requires_grad)
    for name, kind in (("windows", Windows), ("attention", WindowAttention), ("merged", Merged)):
        module.add_module(name, kind(module).train(module.training))
    module.__class__ = ShiftedWindowAttention


class _Shifted(Whole):
    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.window: tuple[int, int] = tuple(owner.window_size)
        self.shift: tuple[int, int] = tuple(owner.shift_size)

    def padded(self, x: Tensor) -> tuple[int, int]:
        """Height and width of an image, padded to whole windows."""
        height, width = (
            -(-size // w) * w for size, w in zip(x.shape[1:3], self.window, strict=True)
        )
        return height, width

    def shifts(self, x: Tensor) -> tuple[int, int]:
        """The shift in each dimension, 0 where one window is as large as the image."""
        sizes = zip(self.shift, self.window, self.padded(x), strict=True)
        down, right = (0 if window >= size else shift for shift, window, size in sizes)
        return down, right

    def partitioned(self, image: Tensor) -> Tensor:
        """(N, H, W, C) -> (N * windows, tokens, C)"""
        height, width = self.window
        rows, columns = image.shape[1] // height, image.shape[2] // width
        x = image.reshape(-1, rows, height, columns, width, image.shape[-1])
        return x.transpose(2, 3).reshape(-1, height * width, image.shape[-1])


class Windows(_Shifted):
    """Pads, shifts and partitions an image."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.padded(x)
        down, right = self.shifts(x)
        if x.shape[1:3] != (height, width):
            x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
        return self.partitioned(x.roll((-down, -right), (1, 2)))


class Merged(_Shifted):
    """Puts the windows of an image together again."""

    def forward(self, windows: Tensor, image: Tensor) -> Tensor:
        height, width = self.padded(image)
        rows, columns = height // self.window[0], width // self.window[1]
        x = windows.view(-1, rows, columns, *self.window, windows.shape[-1])
        x = x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])
        x = x.roll(self.shifts(image), (1, 2))
        return x[:, : image.shape[1], : image.shape[2]].contiguous()


class WindowAttention(_Shifted):
    """Attention in each window, with a bias for relative positions."""

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self.num_heads, self.dropout = owner.num_heads, owner.attention_dropout
        self.logit_scale = getattr(owner, "logit_scale", None)

    def forward(self, qkv: Tensor, image: Tensor, position_bias: Tensor) -> Tensor:
        """From ``qkv`` (N * windows, tokens, 3 * C) to the attended values."""
        split = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        scale = None
        if self.logit_scale is not None:  # the cosine of the angle between them
            own = self.logit_scale.clamp(max=_LARGEST_SCALE).exp()
            q, k, scale = F.normalize(q, dim=-1) * own, F.normalize(k, dim=-1), 1.0
        mask = position_bias
        if any(self.shifts(image)):
            mask = mask + self._blocked(image).unsqueeze(1)
            mask = mask.repeat(len(q) // len(mask), 1, 1, 1)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return attended.transpose(1, 2).flatten(2)

    def _blocked(self, image: Tensor) -> Tensor:
        """Added for tokens (windows, tokens, tokens) that are only neighbours by the shift."""
        regions = [
            (torch.arange(size) >= size - window).int() + (torch.arange(size) >= size - shift)
            for size, window, shift in zip(
                self.padded(image), self.window, self.shifts(image), strict=True
            )
        ]
        region = (3 * regions[0].unsqueeze(1) + regions[1])[None, :, :, None]
        tokens = self.partitioned(region).squeeze(-1)
        return (tokens.unsqueeze(1) != tokens.unsqueeze(2)).to(image.dtype) * _BLOCKED
