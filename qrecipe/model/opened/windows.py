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

from qrecipe.model.integers import padded, rolled
from qrecipe.model.opened.whole import Whole, class_of_the_caller

_Pair = tuple[int, int]

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
        attended = self.attention(self.qkv(self.windows(x)), x.shape, position_bias)
        projected = F.dropout(self.proj(attended), self.dropout, self.training)
        image: Tensor = self.merged(projected, x.shape)
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


def into_windows(image: Tensor, window: _Pair, shift: _Pair) -> Tensor:
    """Pads, shifts and partitions an image, of floats or integers."""
    height, width = _whole_windows(image.shape, window)
    down, right = _shifts(image.shape, window, shift)
    if image.shape[1:3] != (height, width):
        missing = width - image.shape[2], height - image.shape[1]
        image = padded(image, [0, 0, 0, missing[0], 0, missing[1]])
    if down or right:
        image = rolled(image, [-down, -right], [1, 2])
    return _partitioned(image, window)


def from_windows(windows: Tensor, shape: torch.Size, window: _Pair, shift: _Pair) -> Tensor:
    """Puts the windows of an image of this shape together again."""
    height, width = _whole_windows(shape, window)
    rows, columns = height // window[0], width // window[1]
    x = windows.reshape(-1, rows, columns, *window, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])
    shifts = _shifts(shape, window, shift)
    if any(shifts):
        x = rolled(x, list(shifts), [1, 2])
    return x[:, : shape[1], : shape[2]].contiguous()


def _whole_windows(shape: torch.Size, window: _Pair) -> _Pair:
    """Height and width of an image, padded to whole windows."""
    height, width = (-(-size // w) * w for size, w in zip(shape[1:3], window, strict=True))
    return height, width


def _shifts(shape: torch.Size, window: _Pair, shift: _Pair) -> _Pair:
    """The shift in each dimension, 0 where one window is as large as the image."""
    sizes = zip(shift, window, _whole_windows(shape, window), strict=True)
    down, right = (0 if own >= size else shift for shift, own, size in sizes)
    return down, right


def _partitioned(image: Tensor, window: _Pair) -> Tensor:
    """(N, H, W, C) -> (N * windows, tokens, C)"""
    height, width = window
    rows, columns = image.shape[1] // height, image.shape[2] // width
    x = image.reshape(-1, rows, height, columns, width, image.shape[-1])
    return x.transpose(2, 3).reshape(-1, height * width, image.shape[-1])


class _Shifted(Whole):
    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.window: _Pair = tuple(owner.window_size)
        self.shift: _Pair = tuple(owner.shift_size)


class Windows(_Shifted):
    """`into_windows` as a module."""

    def forward(self, image: Tensor) -> Tensor:
        return into_windows(image, self.window, self.shift)


class Merged(_Shifted):
    """`from_windows` as a module."""

    def forward(self, windows: Tensor, shape: torch.Size) -> Tensor:
        return from_windows(windows, shape, self.window, self.shift)


class WindowAttention(_Shifted):
    """Attention in each window, with a bias for relative positions."""

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self.num_heads, self.dropout = owner.num_heads, owner.attention_dropout
        self.logit_scale = getattr(owner, "logit_scale", None)

    def forward(self, qkv: Tensor, shape: torch.Size, position_bias: Tensor) -> Tensor:
        """From ``qkv`` (N * windows, tokens, 3 * C) to the attended values."""
        split = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        scale = None
        if self.logit_scale is not None:  # the cosine of the angle between them
            own = self.logit_scale.clamp(max=_LARGEST_SCALE).exp()
            q, k, scale = F.normalize(q, dim=-1) * own, F.normalize(k, dim=-1), 1.0
        mask = position_bias
        if any(_shifts(shape, self.window, self.shift)):
            mask = mask + self._blocked(shape).to(mask.dtype).unsqueeze(1)
            mask = mask.repeat(len(q) // len(mask), 1, 1, 1)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return attended.transpose(1, 2).flatten(2)

    def _blocked(self, shape: torch.Size) -> Tensor:
        """Added for tokens (windows, tokens, tokens) that are only neighbours by the shift."""
        regions = [
            (torch.arange(size) >= size - window).int() + (torch.arange(size) >= size - shift)
            for size, window, shift in zip(
                _whole_windows(shape, self.window),
                self.window,
                _shifts(shape, self.window, self.shift),
                strict=True,
            )
        ]
        region = (3 * regions[0].unsqueeze(1) + regions[1])[None, :, :, None]
        tokens = _partitioned(region, self.window).squeeze(-1)
        return (tokens.unsqueeze(1) != tokens.unsqueeze(2)) * _BLOCKED
