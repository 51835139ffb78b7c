"""Transposed convolutions that onednn has no fast kernel for are left to x86 or run on fbgemm."""

from __future__ import annotations

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import nn

import qrecipe
from qrecipe.execution.engine import engine
from qrecipe.planning import cpu
from qrecipe.planning.convolution import shape_of
from qrecipe.planning.onednn_transposed import is_slow_on_avx2, is_slow_on_avx512

KINDS = {
    1: (nn.ConvTranspose1d, nnq.ConvTranspose1d),
    2: (nn.ConvTranspose2d, nnq.ConvTranspose2d),
    3: (nn.ConvTranspose3d, nnq.ConvTranspose3d),
}
SHAPES = {
    # dimensions, channels, kernel, options: slow with AVX2, with AVX512-VNNI
    "dilated_with_stride": (2, 32, 3, {"stride": 2, "dilation": 2}, True, True),
    "dilated_with_stride_1d": (1, 32, 3, {"stride": 2, "dilation": 2}, True, True),
    "dilated_across_the_stride": (2, 8, 3, {"stride": (2, 1), "dilation": (1, 2)}, False, False),
    "dilated": (2, 32, 3, {"dilation": 2}, True, False),
    "dilated_and_padded": (2, 32, 3, {"dilation": 2, "padding": 2}, False, False),
    "large": (2, 32, 5, {}, True, False),
    "large_and_padded": (2, 32, 5, {"padding": 2}, False, False),
    "large_across_rows": (2, 32, (5, 3), {}, False, False),
    "few_channels": (2, 16, 4, {"stride": 4}, False, False),
    "stride_3": (2, 32, 3, {"stride": 3}, True, False),
    "stride_4": (2, 96, 4, {"stride": 4}, True, False),
    "stride_8": (2, 21, 16, {"stride": 8, "padding": 4}, True, False),
    "usual": (2, 32, 4, {"stride": 2, "padding": 1}, False, False),
    "padded_whole": (1, 16, 3, {"padding": 3}, True, True),
    "three_dimensions": (3, 32, 2, {"stride": 2}, False, False),
    "groups_of_four": (2, 32, 3, {"groups": 8}, False, False),
    "groups_of_three": (2, 12, 3, {"groups": 4, "stride": 2, "padding": 1}, True, True),
    "depthwise": (2, 16, 3, {"groups": 16, "stride": 2, "padding": 1}, False, False),
    "depthwise_large": (2, 16, 9, {"groups": 16, "dilation": 2}, True, True),
    "depthwise_3d": (3, 16, 3, {"groups": 16}, True, True),
}
_FALLBACK = "conv:any+"


def layer_of(name):
    dimensions, channels, kernel, options, *_ = SHAPES[name]
    torch.manual_seed(0)
    return KINDS[dimensions][0](channels, channels, kernel, **options).eval()


def example_of(layer):
    return torch.rand(2, layer.in_channels, *[9] * len(layer.kernel_size))


def kernel_of(layer, capfd):
    """What onednn itself says that it runs."""
    scheme = torch.quantize_per_tensor(layer.weight.detach(), 0.01, 0, torch.qint8)
    names = ("stride", "padding", "groups", "dilation")
    options = {name: getattr(layer, name) for name in names}
    with engine("onednn"):
        kind = KINDS[len(layer.kernel_size)][1]
        module = kind(layer.in_channels, layer.out_channels, layer.kernel_size, **options)
        module.set_weight_bias(scheme, layer.bias.detach())
    x = torch.quantize_per_tensor(example_of(layer), 1 / 127, 0, torch.quint8)
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        module(x)
    lines = [line.split(",") for line in capfd.readouterr().out.splitlines()]
    return next(line[6] for line in lines if line[3:6] == ["exec", "cpu", "deconvolution"])


@pytest.mark.cpu
@pytest.mark.parametrize("name", SHAPES)
def test_what_onednn_runs_is_known_from_the_shape(name, capfd):
    layer = layer_of(name)
    shape, (*_, avx2, avx512) = shape_of(layer), SHAPES[name]
    assert (is_slow_on_avx2(shape), is_slow_on_avx512(shape)) == (avx2, avx512)
    expected = {"avx2": avx2, "avx512_vnni": avx512}.get(cpu.class_of_cpu())
    if expected is not None:
        assert kernel_of(layer, capfd).startswith(_FALLBACK) is expected


@pytest.mark.parametrize("known_as", ["avx512_vnni", "avx2"])
@pytest.mark.parametrize("name", SHAPES)
def test_none_runs_where_it_is_slow_if_another_engine_is_not(monkeypatch, name, known_as):
    monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda: known_as)
    layer = layer_of(name)
    recipe = qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static"\n'
        '[lint]\nignore = ["QR207", "QR208", "QR212", "QR221"]'
    )
    (site,) = qrecipe.plan(nn.Sequential(layer).eval(), recipe, example_of(layer)).sites
    *_, avx2, avx512 = SHAPES[name]
    # x86 takes onednn with VNNI and fbgemm without
    assert site.engine == ("fbgemm" if avx512 else None if avx2 else "onednn")
