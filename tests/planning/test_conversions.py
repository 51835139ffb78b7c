"""Static models that convert more often than it pays: said without timing anything."""

from __future__ import annotations

import pytest
import torch
from plans import net_of
from torch import nn

import qrecipe

STATIC = "builtin:x86-static"


def converting(channels, kernel=1, steps=6, layers=1):
    """Some convolutions in a row, and that several times between functions without int8 kernels."""

    def forward(self, x):
        for row in self.rows:
            x = torch.softmax(row(torch.cumsum(x, 1)), 1)
        return x

    def convolution():
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    rows = [nn.Sequential(*(convolution() for _ in range(layers))) for _ in range(steps)]
    return net_of(forward, rows=nn.ModuleList(rows))


def slower(model, x, recipe=STATIC):
    return [w.message for w in qrecipe.plan(model, recipe, x).warnings if w.code == "QR207"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_net_with_little_work_between_many_conversions_is_called_slower(batch):
    (message,) = slower(converting(64), torch.randn(batch, 64, 8, 8))
    assert "slower than float at batch 1: 12 conversions" in message


def test_conversions_among_more_layers_count_too():
    (message,) = slower(converting(64, steps=3, layers=4), torch.randn(1, 64, 6, 6))
    assert "6 conversions" in message
    assert not slower(converting(64, steps=2, layers=4), torch.randn(1, 64, 6, 6))


@pytest.mark.parametrize(("features", "is_slow"), [(64, True), (256, False)])
def test_a_small_transformer_is_called_slower(features, is_slow):
    layer = nn.TransformerEncoderLayer(features, 4, 4 * features, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    last = nn.Linear(features, 10)
    model = net_of(lambda self, x: self.last(self.encoder(x)), encoder=encoder, last=last)
    assert bool(slower(model, torch.randn(1, 20, features))) is is_slow


def test_a_net_with_work_for_each_conversion_is_not():
    assert not slower(converting(64, 3), torch.randn(1, 64, 16, 16))


def test_a_net_with_more_layers_than_conversions_is_not():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(4))).eval()
    assert qrecipe.plan(model, STATIC, torch.randn(2, 16, 8, 8)).boundaries == 2
    assert not slower(model, torch.randn(2, 16, 8, 8))


def test_it_is_said_for_the_kernels_of_x86_that_were_measured():
    assert not slower(converting(64), torch.randn(2, 64, 8, 8), "builtin:arm-static")
