"""Depthwise convolutions in three dimensions that one engine computes wrongly for flat images."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

LINT = '[lint]\nignore = ["QR207", "QR208", "QR221"]\n'
FLAT = [(1, 5, 5), (5, 1, 5)]
RIGHT_DB = 18
"""Less than usual: such an image fills a part of the calibrated range."""


def depthwise(kernel, outputs, channels=8, **options):
    torch.manual_seed(0)
    options = {"padding": kernel // 2, **options}
    layer = nn.Conv3d(channels, channels * outputs, kernel, groups=channels, **options)
    return nn.Sequential(layer).eval(), [torch.randn(2, channels, 5, 5, 5)] * 10


def recipe_for(backend, kind="x86-static-minmax", extra=""):
    return qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:{kind}"\nbackend = "{backend}"\n{extra}{LINT}'
    )


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn"])
@pytest.mark.parametrize(
    ("kernel", "outputs", "options", "engine"),
    [
        (5, 1, {}, "onednn"),
        (5, 1, {"stride": 2}, "onednn"),
        (3, 2, {}, "fbgemm"),
        (3, 3, {"padding": (1, 1, 0)}, "fbgemm"),
        (4, 2, {"channels": 3}, "fbgemm"),
    ],
)
def test_they_run_on_the_other_engine_and_are_right(backend, kernel, outputs, options, engine):
    model, batches = depthwise(kernel, outputs, **options)
    recipe = recipe_for(backend)
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.engine or backend) == engine
    assert backend == engine or "is wrong for images of one pixel" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    for depth, height, width in FLAT:
        x = torch.cat(batches)[:, :, :depth, :height, :width]
        assert sqnr_db(model(x), converted(x)) > RIGHT_DB


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn"])
def test_they_stay_float_where_both_are_wrong(backend):
    model, batches = depthwise(5, 2)
    with pytest.raises(qrecipe.UnsupportedError, match=r"in depth or height, and onednn's"):
        qrecipe.plan(model, recipe_for(backend), batches[0])


@pytest.mark.vnni
def test_they_stay_float_where_the_other_engine_saturates():
    model, batches = depthwise(3, 2)
    wide = "[tensor.activation]\nreduce_range = false\n"
    with pytest.raises(qrecipe.UnsupportedError, match="reduce_range"):
        qrecipe.plan(model, recipe_for("x86", extra=wide), batches[0])


@pytest.mark.parametrize(
    ("kernel", "outputs", "options"),
    [
        (3, 1, {}),
        (5, 1, {"channels": 12}),
        (5, 1, {"padding": 1}),
        (3, 2, {"padding": (0, 1, 1)}),
    ],
)
def test_their_neighbours_are_not_called_wrong(kernel, outputs, options):
    model, batches = depthwise(kernel, outputs, **options)
    (site,) = qrecipe.plan(model, recipe_for("x86"), batches[0]).sites
    assert "is wrong" not in (site.reason or "")


_ALONE = """
import sys, torch, torch.ao.nn.quantized as nnq
engine, kernel, outputs, *size = sys.argv[1:]
kernel, outputs, size = int(kernel), int(outputs), map(int, size)
torch.backends.quantized.engine = engine
torch.manual_seed(0)
options = {"padding": kernel // 2, "groups": 8}
float_ = torch.nn.Conv3d(8, 8 * outputs, kernel, **options)
weight = torch.quantize_per_tensor(float_.weight.detach(), 0.01, 0, torch.qint8)
float_.weight.data = weight.dequantize()
module = nnq.Conv3d(8, 8 * outputs, kernel, **options)
module.set_weight_bias(weight, float_.bias.detach())
x = torch.quantize_per_tensor(torch.rand(4, 8, *size), 1 / 127, 0, torch.quint8)
expected = float_(x.dequantize())
module.scale, module.zero_point = float(expected.abs().max()) / 127, 128
error = (module(x).dequantize() - expected).abs().max() / module.scale
print("right" if error < 2 else "wrong")
"""


def runs_right(engine, kernel, outputs, *size):
    command = [sys.executable, "-c", _ALONE, engine, *map(str, (kernel, outputs, *size))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout == "right\n" and done.returncode == 0


@pytest.mark.slow
def test_fbgemm_itself_ends_the_process():
    assert runs_right("fbgemm", 5, 1, 2, 16, 16)
    assert not runs_right("fbgemm", 5, 1, 1, 16, 16)


@pytest.mark.slow
@pytest.mark.vnni
def test_onednn_itself_is_wrong():
    assert runs_right("onednn", 3, 2, 2, 16, 16)
    assert not runs_right("onednn", 3, 2, 1, 16, 16)
