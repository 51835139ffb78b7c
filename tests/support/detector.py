"""A small detector in one shot, as they are written: pyramid, heads for each level, boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Head(nn.Module):
    """What it sees at one level, as (N, H * W * anchors, values)."""

    def __init__(self, channels: int, anchors: int, values: int) -> None:
        super().__init__()
        self.conv = _block(channels, channels, 1)
        self.last = nn.Conv2d(channels, anchors * values, 3, padding=1)
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.conv(x))
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.values)


class Detector(nn.Module):
    """Images (N, 3, H, W) to boxes (N, anchors, 4) in pixels and scores (N, anchors, classes).

    The centres of the anchors are computed for each size once, and kept.
    """

    def __init__(self, classes: int = 5, channels: int = 16) -> None:
        super().__init__()
        self.stem = _block(3, channels, 2)
        self.stages = nn.ModuleList(_block(channels, channels, 2) for _ in range(3))
        self.lateral = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.up = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.boxes, self.scores = Head(channels, 2, 4), Head(channels, 2, classes)
        self.register_buffer("scales", torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        self.strides = (4, 8, 16)
        self.centres: dict[tuple[int, int], Tensor] = {}

    def anchors(self, levels: list[Tensor]) -> Tensor:
        """The centres and sizes of the anchors of all levels, in pixels."""
        found = []
        for level, stride in zip(levels, self.strides, strict=True):
            high, wide = level.shape[-2:]
            if (high, wide) not in self.centres:
                rows = (torch.arange(high) + 0.5) * stride
                columns = (torch.arange(wide) + 0.5) * stride
                self.centres[high, wide] = torch.stack(
                    torch.meshgrid(columns, rows, indexing="xy"), -1
                )
            centres = self.centres[high, wide].reshape(-1, 1, 2).expand(-1, 2, 2)
            sizes = (self.scales * stride).expand(high * wide, 2, 2)
            found.append(torch.cat([centres, sizes], -1).reshape(-1, 4))
        return torch.cat(found)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        seen = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            seen.append(lateral(x))
        levels = [seen.pop()]
        while seen:
            above = self.up(levels[0]) if len(levels) == 1 else F.interpolate(levels[0], None, 2)
            levels.insert(0, seen.pop() + above)
        boxes = torch.cat([self.boxes(level) for level in levels], 1)
        scores = torch.cat([self.scores(level) for level in levels], 1)
        centres, sizes = self.anchors(levels).chunk(2, -1)
        centres = centres + boxes[..., :2].sigmoid() * sizes
        halves = sizes * boxes[..., 2:].clamp(max=4).exp() / 2
        return {
            "boxes": torch.cat([centres - halves, centres + halves], -1),
            "scores": scores.softmax(-1),
        }
