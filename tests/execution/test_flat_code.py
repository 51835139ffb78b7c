"""The code of a quantized graph looks each module up once, and everything else stays as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from runs import silent
from torch import nn

import qrecipe
from qrecipe.model.addresses import SITE


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.body(x) + x


class Net(nn.Module):
    """Paths of digits, and one that is like a local name of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block())])
        self.stages_0 = nn.ModuleDict({"y": nn.Conv2d(4, 4, 1), "x": Block()})

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.stages_0["x"](self.stages_0["y"](x))


@pytest.fixture(scope="module")
def quantized():
    model = Net().eval()
    batches = [torch.randn(2, 4, 8, 8) for _ in range(12)]
    recipe = "builtin:x86-static-minmax"
    return model, qrecipe.quantize(model, recipe, batches, progress=silent), batches[0]


def test_each_module_is_looked_up_once_and_from_what_contains_it(quantized):
    code = quantized[1].code
    looked_up = re.findall(r'= (getattr\(\w+, "\w+"\)|\w+\.\w+)$', code, re.MULTILINE)
    assert "getattr(getattr(" not in code
    assert not re.search(r"= self\.\w+\.\w+", code)
    assert len(looked_up) == len(set(looked_up)) > 5


def test_the_names_of_modules_and_state_are_those_of_the_graph(quantized):
    converted = quantized[1]
    called = {node.target for node in converted.graph.nodes if node.op == "call_module"}
    assert called <= {name for name, _ in converted.named_modules()}
    assert {"stages.0.1.body.2", "stages_0.y"} <= called
    assert all(name.partition(".")[0].startswith("stages") for name in converted.state_dict())
    assert any(SITE in node.meta for node in converted.graph.nodes)


@pytest.mark.parametrize("how", ["deepcopy", "script", "trace", "artifact"])
def test_a_copy_of_any_kind_computes_the_same(quantized, how, tmp_path):
    model, converted, x = quantized
    if how == "deepcopy":
        copied = copy.deepcopy(converted)
        assert copied.code == converted.code
    elif how == "artifact":
        qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
        copied = qrecipe.load_quantized(tmp_path / "net.safetensors", model)
        assert copied.code == converted.code
    else:
        copied = torch.jit.script(converted) if how == "script" else torch.jit.trace(converted, x)
    assert torch.equal(copied(x), converted(x))
