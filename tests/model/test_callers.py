"""What is the caller's own code and what is torch's or ours: folders count, not first letters."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from plans import recipe
from runs import STATIC, silent
from torch import nn

import qrecipe
from qrecipe.errors.findings import TraceError

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x
"""


def executed(source, file):
    """The names that a file's source defines, as if it lay there."""
    names = {"__name__": "net"}
    exec(compile(source, str(file), "exec"), names)
    return names


@pytest.mark.parametrize(
    "file",
    [
        Path(torch.__file__).parents[1] / "torchvision" / "net.py",
        Path(torch.__file__).parents[1] / "torch_geometric" / "net.py",
        Path(qrecipe.__file__).parents[1] / "qrecipe_models" / "net.py",
    ],
)
def test_a_trace_error_names_the_line_of_a_package_whose_name_begins_like_torchs_or_ours(file):
    model = executed(NET, file)["Net"]().eval()
    with pytest.raises(TraceError, match=re.escape(file.name) + ":10 "):
        qrecipe.plan(model, STATIC, torch.ones(2, 4))


def test_a_warning_is_of_the_line_of_a_plugin_whose_name_begins_like_ours():
    file = Path(qrecipe.__file__).parents[1] / "qrecipe_plugin" / "calls.py"
    source = "def quantize(*args, **kwargs):\n    return qrecipe_quantize(*args, **kwargs)\n"
    names = executed(source, file)
    names["qrecipe_quantize"] = qrecipe.quantize
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", qrecipe.QRecipeWarning)
        model = nn.Sequential(nn.Linear(4, 4)).eval()
        names["quantize"](model, STATIC, [torch.rand(2, 4)] * 2, progress=silent)
    assert [Path(each.filename) for each in caught] == [file]


class Block(nn.Module):
    def forward(self, x):
        return x if x.sum() < 0 else x + 1


@pytest.mark.parametrize("package", ["lib.quantized.modules", "lib.qat.blocks"])
def test_a_float_module_from_a_package_with_a_name_of_torchs_stays_float(package, monkeypatch):
    monkeypatch.setattr(Block, "__module__", package)
    model = nn.Sequential(nn.Linear(4, 4), Block()).eval()
    batches = [torch.rand(2, 4) for _ in range(10)]
    kept = recipe('[fx]\nnon_traceable_module_name = ["1"]')
    for wanted in (kept, "builtin:x86-dynamic"):
        converted = qrecipe.quantize(model, wanted, batches, progress=silent)
        assert qrecipe.compare(model, converted, batches, progress=silent).output.sqnr_db > 25
    assert qrecipe.drift(qrecipe.quantize(model, kept, batches, progress=silent), batches).sites
