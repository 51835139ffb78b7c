"""Convolutions that run on another engine's kernel, because their backend's own is wrong."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

FULL = qrecipe.parse_recipe(
    'format = 1\nextends = "builtin:x86-vnni-static"\n[lint]\nignore = ["QR226"]'
)
"""8-bit activations: what takes a detour to onednn is right without VNNI too."""


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
    recipe = replace(FULL, backend=backend)
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.verdict, site.engine) == ("quantized", "onednn")
    assert "saturates" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


def test_without_the_detour_the_kernel_is_wrong(monkeypatch):
    monkeypatch.setattr("qrecipe.planning.backend.detour", lambda *args: None)
    model, batches = depthwise(104), extremes(4, 104, 12, 12)
    monkeypatch.setattr("qrecipe.execution.fx.executor.audit", lambda *args: None)
    converted = qrecipe.quantize(model, FULL, batches, progress=silent, target_cpu="vnni")
    assert error_in_steps(model, converted, batches[0]) > 10


@pytest.mark.parametrize(
    ("options", "recipe", "engine"),
    [
        ({}, "builtin:x86-static", None),
        ({}, FULL, "onednn"),
        ({"padding": 0}, "builtin:x86-static", "onednn"),
        ({"dilation": 2, "padding": 2}, "builtin:x86-static", "onednn"),
        ({"padding_mode": "reflect"}, "builtin:x86-static", "onednn"),
    ],
    ids=["seven_bits", "eight_bits", "other_padding", "dilated", "reflect"],
)
@pytest.mark.parametrize("known_as", ["avx512_vnni", "avx2"])
def test_a_depthwise_convolution_goes_where_every_cpu_is_right_and_fast(
    monkeypatch, known_as, options, recipe, engine
):
    monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda: known_as)
    model, batches = depthwise(96, **options), extremes(4, 96, 12, 12)
    plan = qrecipe.plan(model, recipe, batches[0])
    assert plan.sites[0].engine == engine
    assert not [warning for warning in plan.warnings if warning.code == "QR207"]
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


def test_affine_weights_leave_a_saturating_depthwise_convolution_float():
    recipe = qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-vnni-static"\n'
        '[tensor.weight]\nqscheme = "per_channel_affine"'
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


def test_what_is_packed_for_another_engine_is_known_to_the_audit(monkeypatch):
    # the id of what is packed twice would later be that of something else
    schemes = []

    def look(plan, converted, *args):
        packed = [layer._packed_params for layer in converted.children()]
        schemes.extend(args[-1][id(each)][1] for each in packed)

    monkeypatch.setattr("qrecipe.execution.fx.executor.audit", look)
    model = nn.Sequential(nn.Conv2d(24, 8, 1), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    batches = [torch.randn(2, 24, 6, 6) for _ in range(10)]
    qrecipe.quantize(model.eval(), "builtin:x86-static", batches, progress=silent)
    per_channel, per_tensor = torch.per_channel_affine, torch.per_tensor_affine
    assert schemes == [per_channel, per_tensor, per_channel]


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
    recipe = replace(FULL, backend="fbgemm")
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert site.engine == "onednn"
    assert "saturates" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


def test_a_number_of_channels_that_the_fast_depthwise_kernel_does_not_take_never_saturates():
    model, batches = depthwise(12), extremes(4, 12, 12, 12)
    recipe = replace(FULL, backend="fbgemm")
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert "saturates" not in (site.reason or "")
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert error_in_steps(model, converted, batches[0]) < 4


@pytest.mark.parametrize("known_as", ["avx512_vnni", "avx2"])
def test_where_no_engine_is_fast_on_every_cpu_x86_chooses_and_the_plan_warns_where_both_are_slow(
    monkeypatch, known_as
):
    monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda: known_as)
    model = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1, groups=32)).eval()
    plan = qrecipe.plan(model, "builtin:x86-static", torch.rand(1, 96, 8, 8))
    assert plan.sites[0].engine is None
    slow = [warning for warning in plan.warnings if warning.code == "QR207"]
    assert bool(slow) is (known_as == "avx2")


class DepthwiseFunction(nn.Module):
    def __init__(self, dimensions, transposed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 1, *[3] * dimensions))
        name = f"conv{'_transpose' * transposed}{dimensions}d"
        self.function = getattr(F, name)

    def forward(self, x):
        return self.function(x, self.weight, groups=16)


@pytest.mark.parametrize(
    ("dimensions", "transposed"), [(1, False), (2, False), (1, True), (2, True)]
)
def test_the_packed_weight_of_a_function_takes_the_detour_too_and_is_stored(
    tmp_path, dimensions, transposed
):
    torch.manual_seed(0)
    model = DepthwiseFunction(dimensions, transposed).eval()
    batches = extremes(2, 16, *[6] * dimensions)
    recipe = qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static"\n[lint]\nignore = ["QR207", "QR208"]'
    )
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert site.engine == "onednn"
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    expected = converted(batches[0])
    assert sqnr_db(model(batches[0]), expected) > 25
    qrecipe.save_quantized(converted, tmp_path / "m.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model)
    assert torch.equal(loaded(batches[0]), expected)


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
    assert ("input and output channels differ" in (site.reason or "")) is differ


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


WRONG_WITH_AMX = [
    pytest.param((24, 24, 2), {}, id="24 channels a group"),
    pytest.param((20, 40, 3), {"kernel_size": 5, "padding": 2}, id="20 to 40"),
    pytest.param((1, 24, 4), {"stride": 2}, id="one to 24"),
    pytest.param((31, 17, 2), {"padding": (0, 1)}, id="31 to 17"),
    pytest.param((24, 48, 2), {"padding": 0}, id="48 from a group, no padding"),
    pytest.param((32, 64, 1), {"kernel_size": 4, "stride": 4, "padding": 0}, id="patches of 4"),
    pytest.param((16, 32, 1), {"kernel_size": 8, "stride": 8, "padding": 0}, id="patches of 8"),
    pytest.param((8, 32, 1), {"kernel_size": 16, "padding": 0}, id="16 pixels of 8 channels"),
]
"""Channels per group, and the number of groups."""


def pixels(groups):
    """The height and width of an image in which patches have rows and columns."""
    return (7, 7) if groups > 1 else (16, 16)


def grouped(inputs, outputs, groups, **options):
    torch.manual_seed(0)
    settings = {"kernel_size": 3, "padding": 1, **options}
    return nn.Sequential(
        nn.Conv2d(inputs * groups, outputs * groups, groups=groups, **settings)
    ).eval()


def is_right_on(engine, model, x):
    """Whether the engine's kernel gives what the float convolution gives for equal inputs."""
    (conv,) = model
    weight = torch.quantize_per_tensor(conv.weight.detach(), 0.002, 0, torch.qint8)
    quantized = torch.quantize_per_tensor(x, 0.02, 64, torch.quint8)
    kernel = torch.ao.nn.quantized.Conv2d(
        *(conv.in_channels, conv.out_channels, conv.kernel_size),
        *(conv.stride, conv.padding, conv.dilation, conv.groups),
    )
    kernel.scale, kernel.zero_point = 0.1, 128
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    kernel.set_weight_bias(weight, conv.bias.detach())
    torch.backends.quantized.engine = before
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    expected = F.conv2d(quantized.dequantize(), weight.dequantize(), conv.bias, *settings)
    return float((kernel(quantized).dequantize() - expected).abs().max()) < 0.11


def test_onednn_is_wrong_for_some_convolutions_of_few_channels_on_cpus_with_amx():
    right = {"fbgemm": [], "onednn": []}
    for values in WRONG_WITH_AMX:
        channels, options = values.values
        model, x = (
            grouped(*channels, **options),
            torch.rand(1, channels[0] * channels[2], *pixels(channels[2])),
        )
        for engine, each in right.items():
            each.append(is_right_on(engine, model, 2 * x - 1))
    has_amx = torch.cpu._is_amx_tile_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert all(right["fbgemm"])
    assert all(right["onednn"]) is not has_amx


@pytest.mark.parametrize("backend", every(2, ["x86", "onednn"]))
@pytest.mark.parametrize(("channels", "options"), WRONG_WITH_AMX)
def test_what_is_wrong_with_amx_runs_on_fbgemm_and_is_right(channels, options, backend):
    model = grouped(*channels, **options)
    batches = [torch.randn(2, channels[0] * channels[2], *pixels(channels[2])) for _ in range(12)]
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static-minmax"\nbackend = "{backend}"'
    )
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.verdict, site.engine) == ("quantized", "fbgemm")
    assert "AMX" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 30


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((32, 32, 2), {}),
        ((24, 24, 2), {"padding": 0}),
        ((16, 16, 4), {}),
        ((24, 24, 1), {}),
        ((64, 32, 1), {"kernel_size": 4}),
    ],
)
def test_other_shapes_do_not_go_to_fbgemm(channels, options):
    model = grouped(*channels, **options)
    x = torch.randn(2, channels[0] * channels[2], *pixels(channels[2]))
    (site,) = qrecipe.plan(model, "builtin:x86-static", x).sites
    assert site.engine in (None, "onednn")
    assert is_right_on("onednn", model, x)
