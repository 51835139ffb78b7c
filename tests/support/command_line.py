"""The command line in a folder with a small model, for tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import typer.testing
from typer.testing import CliRunner, Result

from qrecipe.cli.app import app

# typer would read the signatures of all commands again for each one that is run
typer.testing._get_command = cache(typer.testing._get_command)

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))

class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(super().forward(x))

def factory():
    torch.manual_seed(0)
    return Net().eval(), torch.rand(2, 3, 8, 8)

def deeper():
    torch.manual_seed(0)
    return Deeper().eval(), torch.rand(2, 3, 8, 8)
"""
STATIC = "builtin:x86-static"
DYNAMIC = "builtin:x86-dynamic"
NET = ("--model", "net_of_tests.py:factory")
DEEPER = ("--model", "net_of_tests.py:deeper")

TENSORS = """
[tensor.weight]
observer = "minmax"
dtype = "int8"
qscheme = "per_tensor_symmetric"
[tensor.activation]
observer = "{observer}"
dtype = "uint8"
qscheme = "per_tensor_affine"
reduce_range = true
[qconfig.int8]
weight = "weight"
activation = "activation"
"""
RECIPE = 'format = 1\nbackend = "x86"\n' + TENSORS + '[rules]\nglobal = "int8"\n'
TOP = f'format = 1\nextends = "{STATIC}"\n'


def model_folder(folder: Path, monkeypatch) -> Iterator[Path]:
    """A folder with ``net_of_tests.py``, which is the current one until the test ends."""
    (folder / "net_of_tests.py").write_text(MODEL)
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("net_of_tests", None)


def run(*arguments: str | Path) -> Result:
    """The outcome of a command, which never is a traceback."""
    result = invoke([str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def invoke(words: Sequence[str]) -> Result:
    """The outcome of a command in this process."""
    return CliRunner().invoke(app, words, prog_name="qrecipe")
