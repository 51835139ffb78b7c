"""A convolution runs on the engine that is faster on CPUs with VNNI and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from torch import nn

import qrecipe

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")


def engine_of(model, site, x, recipe="builtin:x86-static-minmax"):
    return qrecipe.plan(model, recipe, x)[site].engine


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("channels", "engine"),
    [(24, "onednn"), (32, None), (72, "onednn"), (144, "onednn"), (160, None)],
)
def test_a_depthwise_convolution_leaves_fbgemm_unless_it_fills_its_vectors(
    kernel, stride, channels, engine
):
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1),
        nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels),
    ).eval()
    assert engine_of(model, "1", torch.randn(2, 3, 16, 16)) == engine


@pytest.mark.parametrize("groups", [8, 1])
def test_other_convolutions_stay(groups):
    model = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=groups)).eval()
    assert engine_of(model, "0", torch.randn(2, 24, 16, 16)) is None


POOLS = {
    "module": lambda self, x: self.pool(x),
    "function": lambda self, x: F.adaptive_avg_pool2d(x, (1, 1)),
    "method": lambda self, x: x.mean((2, 3), keepdim=True),
    "mean": lambda self, x: torch.mean(x, dim=[-2, -1], keepdim=True),
}
NO_POOLS = {
    "image": lambda self, x: x,
    "rows": lambda self, x: x.mean(2, keepdim=True),
    "four": lambda self, x: F.adaptive_avg_pool2d(x, 2),
    "kernel": lambda self, x: F.avg_pool2d(x, 4),
    "resized": lambda self, x: F.interpolate(self.pool(x), scale_factor=2),
}


def gated(pool):
    def forward(self, x):
        gate = self.expand(F.silu(self.reduce(pool(self, x))))
        return self.last(x * torch.sigmoid(F.interpolate(gate, x.shape[2:])))

    torch.manual_seed(0)
    return net_of(
        forward,
        pool=nn.AdaptiveAvgPool2d(1),
        reduce=nn.Conv2d(8, 4, 1),
        expand=nn.Conv2d(4, 8, 1),
        last=nn.Conv2d(8, 4, 1),
    )


@pytest.mark.parametrize("name", POOLS)
def test_convolutions_of_one_pixel_run_on_fbgemm(name):
    plan = qrecipe.plan(gated(POOLS[name]), "builtin:x86-static-minmax", torch.randn(2, 8, 4, 4))
    found = {site: plan[site].engine for site in ("reduce", "expand", "last")}
    assert found == {"reduce": "fbgemm", "expand": "fbgemm", "last": None}
    assert "one pixel" in plan["reduce"].reason


@pytest.mark.parametrize("name", NO_POOLS)
def test_those_of_images_that_are_only_small_here_do_not(name):
    model = gated(NO_POOLS[name])
    assert engine_of(model, "reduce", torch.randn(2, 8, 4, 4)) is None
    assert engine_of(model, "expand", torch.randn(2, 8, 4, 4)) is None
