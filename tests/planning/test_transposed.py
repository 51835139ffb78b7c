"""Transposed convolutions: what torch's engines compute, and where the plan puts each."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.execution.engine import engine
from qrecipe.planning import cpu

KINDS = {
    1: (nn.ConvTranspose1d, nnq.ConvTranspose1d, F.conv_transpose1d),
    2: (nn.ConvTranspose2d, nnq.ConvTranspose2d, F.conv_transpose2d),
    3: (nn.ConvTranspose3d, nnq.ConvTranspose3d, F.conv_transpose3d),
}


def steps(packed_for, inputs, outputs, kernel, stride, dimensions=2, **options):
    """The error of torch's own kernel, in steps of its output."""
    torch.manual_seed(0)
    kind, quantized, _ = KINDS[dimensions]
    model = kind(inputs, outputs, kernel, stride, **options)
    x = torch.quantize_per_tensor(
        torch.rand(2, inputs, *[5] * dimensions), 1 / 127, 0, torch.quint8
    )
    weight = torch.quantize_per_tensor(model.weight.detach(), 0.01, 0, torch.qint8)
    with torch.no_grad():
        model.weight.copy_(weight.dequantize())
        expected = model(x.dequantize())
    with engine(packed_for):
        module = quantized(inputs, outputs, kernel, stride, **options)
        module.set_weight_bias(weight, model.bias.detach())
    module.scale, module.zero_point = float(expected.abs().max()) / 127, 128
    return float((module(x).dequantize() - expected).abs().max()) / module.scale


def test_onednn_is_wrong_where_in_and_out_channels_differ_and_x86_where_it_hands_over_to_it():
    assert steps("onednn", 4, 6, 2, 2) > 10
    hands_over = cpu.class_of_cpu() == "avx512_vnni"
    assert (steps("x86", 4, 6, 2, 2) > 10) is hands_over
    assert steps("fbgemm", 4, 6, 2, 2) < 2
    assert steps("onednn", 4, 4, 2, 2) < 2


@pytest.mark.parametrize("kernel", [2, (2, 1), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
def test_fbgemm_is_wrong_since_2_13_for_two_rows_and_channels_in_multiples_of_eight(kernel, stride):
    is_wrong = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert (steps("fbgemm", 16, 8, kernel, stride) > 10) is is_wrong
    assert steps("fbgemm", 16, 12, kernel, stride) < 2


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3},
        {"kernel": (3, 2)},
        {"stride": 3},
        {"padding": 1},
        {"padding": (0, 1)},
        {"dilation": 2},
        {"groups": 2},
        {"dimensions": 1},
        {"dimensions": 3},
    ],
    ids=str,
)
def test_fbgemm_is_right_for_the_neighbours_of_what_it_gets_wrong(options):
    assert steps("fbgemm", 16, 16, **{"kernel": 2, "stride": 2, **options}) < 2


class Function(nn.Module):
    def __init__(self, module, function):
        super().__init__()
        self.weight, self.bias, self.function = module.weight, module.bias, function
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        self.options = {name: getattr(module, name) for name in names}

    def forward(self, x):
        return self.function(x, self.weight, self.bias, **self.options)


class Many(nn.Module):
    """One input, and a transposed convolution of each shape beside the others."""

    def __init__(self, dimensions, as_function):
        super().__init__()
        kind, _, function = KINDS[dimensions]
        kernels = ((1, 1), (2, 1), (2, 2), (3, 2), (4, 4))
        channels = ((16, 1), (8, 1), (24, 1), (6, 1), (1, 1), (16, 2), (8, 2), (32, 4), (16, 16))
        options = ({}, {"padding": 1}, {"output_padding": 1}, {"dilation": 2}, {"bias": False})
        self.layers = nn.ModuleList()
        for (kernel, stride), (outputs, groups), more in itertools.product(
            kernels, channels, options
        ):
            pads = max(stride, more.get("dilation", 1)) > more.get("output_padding", 0)
            if pads and kernel > more.get("padding", 0):
                layer = kind(16, outputs, kernel, stride, groups=groups, **more)
                self.layers.append(Function(layer, function) if as_function else layer)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.slow
@pytest.mark.parametrize("as_function", [False, True], ids=["modules", "functions"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_shape_that_is_planned_quantized_is_right(backend, dimensions, as_function):
    torch.manual_seed(0)
    model = Many(dimensions, as_function).eval()
    batches = [torch.rand(2, 16, *[4] * dimensions) for _ in range(10)]
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static"\nbackend = "{backend}"\n'
        '[lint]\nignore = ["QR207", "QR212"]'
    )
    if backend == "qnnpack" and dimensions == 3:
        with pytest.raises(qrecipe.UnsupportedError):
            qrecipe.plan(model, recipe, batches[0])
        return
    plan = qrecipe.plan(model, recipe, batches[0])
    share = sum(site.verdict == "quantized" for site in plan.sites) / len(plan.sites)
    assert share > (0.7 if backend == "onednn" else 0.9)
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    for expected, found in zip(model(batches[0]), converted(batches[0]), strict=True):
        assert sqnr_db(expected, found) > 20


CHANNELS = {
    (16, 16): ("onednn", "two rows"),
    (16, 8): (None, "and onednn's if input and output channels differ"),
    (12, 6): ("fbgemm", "input and output channels differ"),
    (12, 12): ("onednn", "fbgemm's is slower"),
}


@pytest.mark.parametrize(
    "case", every(3, itertools.product(CHANNELS, ["module", "function"], ["avx512_vnni", "avx2"]))
)
def test_the_upsampling_of_a_unet_goes_to_an_engine_that_is_right_on_every_cpu_or_stays_float(
    monkeypatch, tmp_path, case
):
    channels, spelling, known_as = case
    engine, why = CHANNELS[channels]
    monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda: known_as)
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(*channels, 2, stride=2)
    up = Function(up, F.conv_transpose2d) if spelling == "function" else up
    model = nn.Sequential(
        nn.Conv2d(4, channels[0], 3), up, nn.ReLU(), nn.Conv2d(channels[1], 8, 3)
    ).eval()
    batches = [torch.randn(2, 4, 6, 6) for _ in range(10)]
    recipe = qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static"\n[lint]\nignore = ["QR208"]'
    )
    site = qrecipe.plan(model, recipe, batches[0]).sites[1]
    assert site.engine == engine
    assert why in (site.reason or "")
    assert (site.verdict == "float") is (channels == (16, 8))
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25
    qrecipe.save_quantized(converted, tmp_path / "up.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "up.safetensors", model)
    assert torch.equal(loaded(batches[0]), converted(batches[0]))
