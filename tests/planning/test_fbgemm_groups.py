"""fbgemm's kernel for small groups overruns its output, unless the groups fill its vectors."""

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


def grouped(channels, groups, **options):
    torch.manual_seed(0)
    kind = nn.Conv3d if options.pop("dimensions", 2) == 3 else nn.Conv2d
    options = {"kernel_size": 3, "padding": 1, **options}
    layer = kind(channels * groups, channels * groups, groups=groups, **options)
    x = torch.randn(2, channels * groups, *[6] * len(layer.kernel_size))
    return nn.Sequential(layer).eval(), [x] * 10


def recipe_for(backend, extra=""):
    return qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static-minmax"\nbackend = "{backend}"\n{extra}{LINT}'
    )


UNFILLED = {
    "two": (2, 12, {}),
    "two_on_avx2": (2, 6, {}),
    "four": (4, 3, {}),
    "eight": (8, 3, {}),
    "more_than_x86_gives_onednn": (4, 110, {}),
    "stride": (4, 5, {"stride": 2}),
    "same": (4, 3, {"padding": "same"}),
    "three_dimensions": (4, 7, {"dimensions": 3}),
    "temporal_stride": (4, 7, {"dimensions": 3, "stride": (3, 1, 1)}),
}


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["x86", "fbgemm"])
@pytest.mark.parametrize("name", UNFILLED)
def test_groups_that_fill_no_vector_run_on_onednn_and_are_right(name, backend):
    channels, groups, options = UNFILLED[name]
    model, batches = grouped(channels, groups, **options)
    recipe = recipe_for(backend)
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.engine, "small groups is wrong" in site.reason) == ("onednn", True)
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25


def test_they_stay_float_with_weights_that_onednn_does_not_take():
    model, batches = grouped(4, 3)
    recipe = recipe_for("x86", '[tensor.weight]\nqscheme = "per_channel_affine"\n')
    with pytest.raises(qrecipe.UnsupportedError, match="small groups is wrong"):
        qrecipe.plan(model, recipe, batches[0])


@pytest.mark.parametrize(
    ("channels", "groups", "options"),
    [
        (2, 8, {}),
        (4, 8, {}),
        (8, 2, {}),
        (16, 3, {}),
        (4, 3, {"kernel_size": 5, "padding": 2}),
        (4, 3, {"padding": 0}),
        (4, 3, {"stride": (1, 2)}),
    ],
)
def test_their_neighbours_are_not_called_wrong(channels, groups, options):
    model, batches = grouped(channels, groups, **options)
    (site,) = qrecipe.plan(model, recipe_for("x86"), batches[0]).sites
    assert "is wrong" not in (site.reason or "")


_ALONE = """
import sys, torch, torch.ao.nn.quantized as nnq
torch.backends.quantized.engine = "fbgemm"
channels, groups = map(int, sys.argv[1:])
torch.manual_seed(0)
float_ = torch.nn.Conv2d(channels * groups, channels * groups, 3, padding=1, groups=groups)
weight = torch.quantize_per_tensor(float_.weight.detach(), 0.01, 0, torch.qint8)
float_.weight.data = weight.dequantize()
module = nnq.Conv2d(channels * groups, channels * groups, 3, padding=1, groups=groups)
module.set_weight_bias(weight, float_.bias.detach())
x = torch.quantize_per_tensor(torch.rand(1, channels * groups, 6, 6), 1 / 127, 0, torch.quint8)
expected = float_(x.dequantize())
module.scale, module.zero_point = float(expected.abs().max()) / 127, 128
error = (module(x).dequantize() - expected).abs().max() / module.scale
print("right" if error < 2 else "wrong")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "groups", "is_right"), [(2, 13, False), (4, 7, False), (4, 8, True)]
)
def test_fbgemm_itself_is_wrong_there_or_ends_the_process(channels, groups, is_right):
    command = [sys.executable, "-c", _ALONE, str(channels), str(groups)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout == "right\n" and done.returncode == 0) is is_right
