"""onednn is wrong, or crashes, where the padding is as wide as the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

WIDE = {
    "one_dilated_pixel": (nn.Conv2d, (8, 16, 1), {"dilation": 2, "padding": 1, "stride": (1, 2)}),
    "in_one_dimension": (nn.Conv1d, (8, 16, 1), {"dilation": 2, "padding": 2, "stride": 3}),
    "two_outputs": (nn.Conv2d, (8, 16, 2), {"padding": 2, "groups": 8}),
    "three_outputs": (nn.Conv2d, (8, 24, 3), {"padding": (3, 1), "groups": 8}),
}
RIGHT = {
    "one_pixel": (nn.Conv2d, (8, 16, 1), {"padding": 1}),
    "dilated": (nn.Conv2d, (8, 16, 3), {"dilation": 2, "padding": 2}),
    "same": (nn.Conv2d, (8, 16, 3), {"padding": 1, "groups": 8}),
}


def wide(kind, sizes, options):
    torch.manual_seed(0)
    dimensions = 1 if kind is nn.Conv1d else 2
    shape = (2, 8, 11, 9)[: dimensions + 2]
    return nn.Sequential(kind(*sizes, **options)).eval(), [torch.randn(shape)] * 10


def recipe_for(backend):
    return qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static-minmax"\nbackend = "{backend}"\n'
        '[lint]\nignore = ["QR207", "QR208", "QR221"]\n'
    )


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn"])
@pytest.mark.parametrize("name", WIDE)
def test_such_a_convolution_runs_on_fbgemm_and_is_right(backend, name):
    model, batches = wide(*WIDE[name])
    recipe = recipe_for(backend)
    (site,) = qrecipe.plan(model, recipe, batches[0]).sites
    assert (site.engine or backend) == "fbgemm"
    assert backend == "fbgemm" or "as wide as the kernel" in site.reason
    converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    for x in (batches[0], batches[0][..., :1]):
        assert sqnr_db(model(x), converted(x)) > 20


@pytest.mark.parametrize("name", RIGHT)
def test_others_are_not_called_wrong(name):
    model, batches = wide(*RIGHT[name])
    (site,) = qrecipe.plan(model, recipe_for("x86"), batches[0]).sites
    assert "is wrong" not in (site.reason or "")


_ALONE = """
import torch, torch.ao.nn.quantized as nnq
torch.backends.quantized.engine = "onednn"
layer = nnq.Conv2d(8, 16, 1, dilation=2, padding=1, stride=(1, STRIDE))
layer(torch.quantize_per_tensor(torch.rand(2, 8, 11, 1), 1 / 127, 0, torch.quint8))
print("ran")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "runs"), [(1, True), (2, False)])
def test_onednn_itself_ends_the_process(stride, runs):
    command = [sys.executable, "-c", _ALONE.replace("STRIDE", str(stride))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout == "ran\n") is runs
