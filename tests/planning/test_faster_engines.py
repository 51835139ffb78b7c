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
    [(8, "onednn"), (24, "onednn"), (32, None), (72, None), (144, None)],
)
def test_a_depthwise_convolution_leaves_fbgemm_unless_it_fills_a_vector(
    kernel, stride, channels, engine
):
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1),
        nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels),
    ).eval()
    assert engine_of(model, "1", torch.randn(2, 3, 16, 16)) == engine


FEW_CHANNELS = {
    "stem": nn.Conv2d(3, 128, 7, 2, 3),
    "dense": nn.Conv2d(64, 128, 3, padding=1),
    "widening": nn.Conv2d(24, 144, 1),
    "narrowing": nn.Conv2d(144, 24, 1),
    "groups": nn.Conv2d(128, 128, 3, padding=1, groups=2),
    "one_dimension": nn.Conv1d(16, 32, 5),
    "three_dimensions": nn.Conv3d(3, 64, 3, padding=1),
}
MANY_CHANNELS = {
    "dense": nn.Conv2d(96, 64, 3),
    "pixels": nn.Conv2d(64, 64, 1),
    "small_groups": nn.Conv2d(24, 24, 3, padding=1, groups=8),
}


def example_of(convolution):
    return torch.randn(2, convolution.in_channels, *[9] * len(convolution.kernel_size))


@pytest.mark.parametrize("name", FEW_CHANNELS)
def test_a_convolution_of_few_channels_runs_on_onednn_on_every_cpu(name):
    convolution = FEW_CHANNELS[name]
    (site,) = qrecipe.plan(
        nn.Sequential(convolution).eval(), "builtin:x86-static-minmax", example_of(convolution)
    ).sites
    assert (site.engine, site.reason) == ("onednn", None)  # x86 does the same where VNNI is


@pytest.mark.parametrize("name", MANY_CHANNELS)
def test_other_convolutions_are_left_to_x86(name):
    convolution = MANY_CHANNELS[name]
    assert engine_of(nn.Sequential(convolution).eval(), "0", example_of(convolution)) is None


@pytest.mark.parametrize("extra", ['[tensor.weight]\nqscheme = "per_channel_affine"', "fbgemm"])
def test_few_channels_stay_where_onednn_takes_no_such_weight_or_is_not_meant(extra):
    extra = f'backend = "{extra}"' if extra == "fbgemm" else extra
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-static-minmax"\n{extra}')
    convolution = FEW_CHANNELS["dense"]
    x = example_of(convolution)
    assert engine_of(nn.Sequential(convolution).eval(), "0", x, recipe) is None


@pytest.mark.cpu
@pytest.mark.parametrize("name", FEW_CHANNELS)
def test_few_channels_are_right_on_onednn(name):
    convolution = FEW_CHANNELS[name]
    model, batches = nn.Sequential(convolution).eval(), [example_of(convolution)] * 10
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", batches, progress=False)
    scale = converted.get_submodule("0").scale
    assert (model(batches[0]) - converted(batches[0])).abs().max() < 4 * scale


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
    assert found == {"reduce": "fbgemm", "expand": "fbgemm", "last": "onednn"}
    assert "one pixel" in plan["reduce"].reason


@pytest.mark.parametrize("name", NO_POOLS)
def test_those_of_images_that_are_only_small_here_do_not(name):
    model = gated(NO_POOLS[name])
    assert engine_of(model, "reduce", torch.randn(2, 8, 4, 4)) == "onednn"
    assert engine_of(model, "expand", torch.randn(2, 8, 4, 4)) == "onednn"


@pytest.mark.parametrize("groups", [24, 96, 104])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_two_outputs_per_channel_run_on_fbgemm(groups, kernel, stride):
    layer = nn.Conv2d(groups, 2 * groups, kernel, stride, kernel // 2, groups=groups)
    model, x = nn.Sequential(layer).eval(), torch.randn(2, groups, 9, 9)
    assert engine_of(model, "0", x) == "fbgemm"
