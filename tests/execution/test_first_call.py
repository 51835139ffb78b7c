"""The audit's calls do not decide for which shape onednn's convolutions are fast."""

from __future__ import annotations

import pytest
import torch
from plans import net_of
from runs import silent
from torch import nn
from torch.overrides import TorchFunctionMode

import qrecipe

IMAGES = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(0))


class Packed(TorchFunctionMode):
    """Keeps the packed weights with which convolutions are called."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("quantized.conv") and "prepack" not in str(func):
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


def _functional(self, x):
    y = torch.conv2d(x, self.a.weight, self.a.bias, padding=1)
    return self.last(torch.conv_transpose2d(y, self.up.weight, stride=2))


@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
@pytest.mark.parametrize("forward", [lambda self, x: self.last(self.up(self.a(x))), _functional])
def test_convolutions_for_onednn_have_not_been_called_when_the_caller_gets_them(forward):
    torch.manual_seed(0)
    model = net_of(
        forward,
        a=nn.Conv2d(8, 8, 3, padding=1),
        up=nn.ConvTranspose2d(8, 8, 3, 2),
        last=nn.Conv2d(8, 4, 1),
    )
    recipe = qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static-minmax"\nbackend = "onednn"\n'
    )
    with Packed() as audited:
        converted = qrecipe.quantize(model, recipe, [IMAGES] * 2, progress=silent)
    with Packed() as called:
        output = converted(IMAGES)
    assert len(called.weights) == 3
    assert not set(map(id, called.weights)) & set(map(id, audited.weights))
    assert torch.equal(output, converted(IMAGES))
