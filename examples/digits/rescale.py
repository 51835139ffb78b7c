"""A synthetic stressor: the same network, with channels of very different range.

The scales of BatchNorm channels are multiplied by random powers of two, and the next convolution is
divided by the same factors. The function stays the same, but one scale for a whole tensor no longer
fits. Networks are not trained to be like this; it shows what quantization loses when ranges differ.
"""

from __future__ import annotations

import copy

import torch
from digits import DigitNet, factory
from torch import nn

SPREAD = 3.0
"""Scales between 2**-SPREAD and 2**SPREAD: channels that differ 64 times in range."""


def stressed() -> DigitNet:
    """The trained network rescaled with seed 0, for use on the command line."""
    return rescaled(factory()[0], seed=0)


@torch.no_grad()
def rescaled(model: DigitNet, seed: int, spread: float = SPREAD) -> DigitNet:
    """A copy of the model that computes the same, except for rounding."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    blocks = (changed.block1, changed.block2)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (changed.stem[1], changed.stage1[0]),
        *((block.depthwise[1], block.pointwise) for block in blocks),
    ]
    for norm, conv in pairs:
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(conv, nn.Conv2d)
        exponents = (torch.rand(norm.num_features, generator=generator) * 2 - 1) * spread
        factors = torch.exp2(exponents)
        norm.weight.mul_(factors)
        norm.bias.mul_(factors)
        conv.weight.div_(factors[:, None, None])  # [out, in, height, width]
    return changed
