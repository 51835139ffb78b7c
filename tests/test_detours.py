"""Convolutions that run on another engine's kernel, because their backend's own is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qrecipe
from qrecipe.sqnr import sqnr_db

FULL = "builtin:x86-vnni-static"


def silent(done, total):
    pass


def extremes(*shape):
    """Inputs that use the whole range: what saturates has to add up large products."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*shape, generator=generator) for _ in range(12)]


def depthwise(groups, **options):
    torch.manual_seed(0)
    shape = {"kernel_size": 3, "padding": 1, **options}
    conv = nn.Conv2d(groups, groups, groups=groups, **shape)
    with torch.no_grad():
        conv.weight.copy_(torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0))
    return nn.Sequential(conv).eval()


def error_in_steps(model, converted, x):
    scale = converted.get_submodule("0").scale
    return float((model(x) - converted(x)).abs().max() / scale)


@pytest.mark.parametrize(("backend", "groups"), [("x86", 104), ("fbgemm", 16)])
def test_a_depthwise_convolution_that_would_saturate_runs_on_onednn_and_is_right(backend, groups):
    model, batches = depthwise(groups), extremes(4, groups, 12, 12)
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{FULL}"\nbackend = "{backend}"')
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.verdict, site.engine) == ("quantized", "onednn")
    assert "saturates" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


def test_without_the_detour_the_kernel_is_wrong(monkeypatch):
    monkeypatch.setattr("qrecipe.backend.detour", lambda *args: None)
    model, batches = depthwise(104), extremes(4, 104, 12, 12)
    monkeypatch.setattr("qrecipe.fx.parts.audit", lambda *args: None)
    converted = qrecipe.quantize(model, FULL, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) > 10


@pytest.mark.parametrize(
    ("groups", "options", "recipe"),
    [
        (104, {}, "builtin:x86-static"),
        (96, {}, FULL),
        (96, {"padding": 0}, FULL),
        (96, {"dilation": 2, "padding": 2}, FULL),
    ],
    ids=["seven_bits", "few_groups", "other_padding", "dilated"],
)
def test_a_depthwise_convolution_that_is_right_needs_no_detour(groups, options, recipe):
    model, batches = depthwise(groups, **options), extremes(4, groups, 12, 12)
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert site.engine is None
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


def test_affine_weights_leave_a_saturating_depthwise_convolution_float():
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "{FULL}"\n[tensor.weight]\nqscheme = "per_channel_affine"'
    )
    model = nn.Sequential(*depthwise(16), nn.Conv2d(16, 4, 1)).eval()
    plan = qrecipe.plan(model, recipe, torch.rand(1, 16, 8, 8))
    assert [site.verdict for site in plan.sites] == ["float", "quantized"]
    assert "reduce_range" in plan.sites[0].reason


@pytest.mark.parametrize("backend", ["x86", "onednn"])
def test_a_transposed_convolution_between_different_channels_runs_on_fbgemm_and_is_right(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 3)).eval()
    batches = [torch.randn(4, 8, 6, 6) for _ in range(12)]
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static"\nbackend="{backend}"'
    )
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.verdict, site.engine) == ("quantized", "fbgemm")
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25


def test_a_detour_leaves_the_engine_of_the_process_as_it_was():
    before = torch.backends.quantized.engine
    qrecipe.quantize(depthwise(104), FULL, extremes(4, 104, 12, 12), progress=silent)
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 5, "padding": 2}, {"kernel_size": 7, "padding": 3}, {"stride": 2}],
    ids=["five", "seven", "stride"],
)
def test_every_shape_of_the_fast_depthwise_kernel_takes_the_detour_and_is_right(options):
    model, batches = depthwise(16, **options), extremes(4, 16, 12, 12)
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{FULL}"\nbackend = "fbgemm"')
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert site.engine == "onednn"
    assert "saturates" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


def test_a_number_of_channels_that_the_fast_depthwise_kernel_does_not_take_never_saturates():
    model, batches = depthwise(12), extremes(4, 12, 12, 12)
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{FULL}"\nbackend = "fbgemm"')
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert "saturates" not in (site.reason or "")
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


class Transposed(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(inputs, outputs // groups, 3, 3) * 0.2)

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, None, 1, 0, 0, self.groups)


@pytest.mark.parametrize(("outputs", "differ"), [(8, False), (4, True)])
def test_channels_of_a_transposed_convolution_are_counted_over_all_groups(outputs, differ):
    net = nn.Sequential(nn.Conv2d(8, 8, 1), Transposed(8, outputs, 2)).eval()
    site = qrecipe.plan(net, "builtin:x86-static", torch.randn(2, 8, 6, 6)).sites[-1]
    assert site.op == "conv_transpose2d"
    assert ("in and out channels differ" in (site.reason or "")) is differ


class Function(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, stride=2, output_padding=1)


@pytest.mark.parametrize(
    "padded", [nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1), Function()]
)
def test_a_transposed_convolution_that_pads_its_output_stays_float_on_onednn(padded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), padded).eval()
    batches = extremes(2, 4, 8, 8)
    text = 'format = 1\nextends = "builtin:x86-static"\nbackend = "{}"'
    recipes = [qrecipe.parse_recipe(text.format(backend)) for backend in ("onednn", "x86")]
    plans = [qrecipe.plan(model, recipe, batches[0]) for recipe in recipes]
    onednn, x86 = (plan.sites[1] for plan in plans)
    assert (onednn.verdict, x86.verdict) == ("float", "quantized")
    assert "output_padding" in onednn.reason
    for recipe in recipes:
        converted = qrecipe.quantize(model, recipe, batches, progress=silent)
        assert sqnr_db(model(batches[0]), converted(batches[0])) > 25
