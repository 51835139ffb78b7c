"""Weights are quantized as torch does it, in less time."""

from __future__ import annotations

import math

import pytest
import torch

from qrecipe._torch_ao import quiet
from qrecipe.execution.packing import quantized_per_channel

USUAL = (torch.qint8, 0, 0)


@pytest.mark.parametrize(
    "shape", [(16, 3, 3, 3), (7, 5), (4, 6, 5), (3, 4, 2, 2, 2), (0, 3), (600, 300)]
)
@pytest.mark.parametrize(
    ("dtype", "zero_point", "axis"),
    [USUAL, (torch.qint8, 3, 0), (torch.quint8, 128, 0), (torch.qint8, 0, 1)],
)
def test_the_codes_are_those_of_torch(shape, dtype, zero_point, axis):
    generator = torch.Generator().manual_seed(len(shape))
    weight = torch.randn(shape, generator=generator)
    scale = 2.0 ** torch.randint(-9, 2, (shape[axis],), generator=generator)  # many ties
    scale[::2] *= 0.99
    _check(weight, scale, zero_point, axis, dtype)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30])
def test_weights_that_no_code_stands_for_become_what_torch_makes_of_them(odd):
    weight = torch.randn(4, 8)
    weight[1, 2] = odd
    _check(weight, torch.full((4,), 0.01), *reversed(USUAL))


def test_a_weight_in_another_memory_format_keeps_it():
    weight = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    _check(weight, torch.full((4,), 0.01), *reversed(USUAL))


def _check(weight, scale, zero_point, axis, dtype):
    zero_points = torch.full(scale.shape, zero_point)
    with quiet():
        found, expected = (
            quantize(weight, scale, zero_points, axis, dtype)
            for quantize in (quantized_per_channel, torch.quantize_per_channel)
        )
    assert torch.equal(found.int_repr(), expected.int_repr())
    assert torch.equal(found.q_per_channel_scales(), expected.q_per_channel_scales())
    assert torch.equal(found.q_per_channel_zero_points(), expected.q_per_channel_zero_points())
    assert found.q_per_channel_axis() == expected.q_per_channel_axis()
    assert found.stride() == expected.stride()
    assert (found.dtype, found.qscheme()) == (expected.dtype, expected.qscheme())
