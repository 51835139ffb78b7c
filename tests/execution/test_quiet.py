"""What is filtered of torch's warnings, where, and for how long."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from plans import net_of
from runs import STATIC, silent
from torch import nn
from training import qat_recipe, trained

import qrecipe
from qrecipe._torch_ao import quiet

NOTICE = "torch.ao.quantization is deprecated and will be removed"


def test_notices_are_held_back_inside_and_shown_again_behind_it():
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as held_back:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn(NOTICE, DeprecationWarning, stacklevel=1)
    assert held_back == []
    assert warnings.filters == before
    with pytest.warns(DeprecationWarning, match=NOTICE):
        warnings.warn(NOTICE, DeprecationWarning, stacklevel=1)


def test_filters_are_as_before_behind_an_error_too():
    before = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert warnings.filters == before


def test_other_warnings_pass():
    with pytest.warns(UserWarning, match="of the model's own"), quiet():
        warnings.warn("of the model's own", UserWarning, stacklevel=1)


def test_quantizing_leaves_the_filters_of_the_process_alone():
    before, net = list(warnings.filters), NETS["mlp"]
    qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    assert warnings.filters == before


@pytest.mark.parametrize(
    "act",
    [
        nn.LeakyReLU(0.1, inplace=True),
        lambda x: F.leaky_relu(x, 0.1, True),
        lambda x: F.leaky_relu_(x),
    ],
)
def test_a_leaky_relu_in_place_does_not_make_torch_warn(act, capfd):
    layers = {"a": nn.Linear(4, 4), "act": act, "b": nn.Linear(4, 4)}
    model = net_of(lambda self, x: self.b(self.act(self.a(x))), **layers)
    batch = torch.rand(2, 4)
    converted = qrecipe.quantize(model, STATIC, [batch] * 10, progress=silent)
    converted(batch)
    assert capfd.readouterr().err == ""


def test_a_dropout_in_training_leaves_no_observer_that_sees_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 4)).eval()
    compiled, prepared = trained(model, [torch.rand(2, 4)] * 3, qat_recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled.convert(prepared)


IN_A_FRESH_PROCESS = """
import sys
import warnings
import torch
from torch import nn
import qrecipe

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x

def net(width=4):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()

def quantize(**keywords):
    return qrecipe.quantize(net(), "builtin:x86-static-minmax", rows, progress=False, **keywords)

def fails():
    try:
        qrecipe.plan(Branching().eval(), "builtin:x86-static", rows[0])
    except qrecipe.TraceError:
        return
    raise AssertionError

def misfits():
    qrecipe.save_quantized(quantize(), sys.argv[1])
    try:
        qrecipe.load_quantized(sys.argv[1], net(5))
    except qrecipe.ArtifactError:
        return
    raise AssertionError

rows = [torch.randn(4, 6) for _ in range(10)]
before = list(warnings.filters)
{step}
assert warnings.filters == before
"""


@pytest.mark.parametrize(
    "step",
    [
        "fails()",
        pytest.param("misfits()", marks=pytest.mark.slow),
        pytest.param('quantize(executor="pt2e")', marks=pytest.mark.slow),
    ],
)
def test_what_torch_imports_on_the_way_leaves_no_filters_behind(step, tmp_path):
    if "pt2e" in step and find_spec("torchao") is None:
        pytest.skip("needs torchao")
    program = IN_A_FRESH_PROCESS.replace("{step}", step)
    command = [sys.executable, "-c", program, str(tmp_path / "model.safetensors")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
