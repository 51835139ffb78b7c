"""A folder with a model, recipes and batches, in which commands run."""

from __future__ import annotations

import sys

import pytest
from command_line import RECIPE

MODEL = """
import torch
from torch import nn

print("loading", __name__)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def factory():
    return bare(), torch.rand(2, 3, 8, 8)

def bare():
    import helper
    torch.manual_seed(helper.SEED)
    return Net().eval()

def batches():
    print("drawing batches")
    return [torch.rand(2, 3, 8, 8) for _ in range(10)]

def labelled():
    return [(batch, torch.zeros(2)) for batch in batches()]

def accuracy(model):
    return float(model(torch.ones(1, 3, 8, 8)).shape[1])

def named(model):
    return "good"

def broken():
    weights = {}
    return weights["missing"]

def training():
    return Net().train(), torch.rand(2, 3, 8, 8)

def number():
    return 3

instance = Net()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("SEED = 0\n")
    (tmp_path / "good.toml").write_text(RECIPE.format(observer="minmax"))
    (tmp_path / "bad.toml").write_text(RECIPE.format(observer="minmaxx"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    _forget_modules()  # another test may have left its own
    yield tmp_path
    _forget_modules()


def _forget_modules():
    for name in ("model", "helper", "plugin"):
        sys.modules.pop(name, None)


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C while a ranking is measured."""
    from qrecipe.measure.sensitivity import scores

    count = iter(range(100))
    added = scores.Score.add

    def add(self, part):
        if next(count) == 5:
            raise KeyboardInterrupt
        added(self, part)

    monkeypatch.setattr(scores.Score, "add", add)
