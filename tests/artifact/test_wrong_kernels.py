"""Files whose plans name engines with wrong kernels: of an older release, or forged."""

from __future__ import annotations

import json

import pytest
import torch
from artifacts import pack, parts, refused, unpack
from forgery import forge
from runs import silent
from torch import nn

import qrecipe
from qrecipe.execution.own_engines import own_engines


class Net(nn.Module):
    """In each layer, another engine is wrong for some images or on some CPUs."""

    def __init__(self):
        super().__init__()
        self.groups = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.wide = nn.Conv2d(12, 24, 2, padding=2, groups=12)

    def forward(self, x):
        return self.wide(self.groups(x))


def quantized(model, x, extra=""):
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static-minmax"\n{extra}'
        '[lint]\nignore = ["QR207", "QR208", "QR221"]\n'
    )
    return qrecipe.quantize(model, recipe, [x] * 10, progress=silent)


def made_by_another_release(path, engine):
    """Let a file be of another release of torch, whose plan had this engine for every site."""
    tensors, metadata, content = parts(path)
    plan = unpack(metadata["plan"])
    for site in plan["sites"]:
        site["engine"] = engine
    needs = {**json.loads(metadata["needs"]), "engines": list(filter(None, ("x86", engine)))}
    versions = {**json.loads(metadata["versions"]), "torch": "2.12.0"}
    changed = {"needs": json.dumps(needs), "versions": json.dumps(versions)}
    made = {**metadata, "plan": pack(plan), **changed}
    forge(path, tensors, made, content)


@pytest.mark.cpu
@pytest.mark.parametrize("engine", [None, "fbgemm", "onednn"])
def test_they_run_on_the_engine_that_is_right(tmp_path, engine):
    torch.manual_seed(0)
    model, x, path = Net().eval(), torch.randn(2, 12, 6, 6), tmp_path / "model.safetensors"
    converted = quantized(model, x)
    qrecipe.save_quantized(converted, path)
    made_by_another_release(path, engine)
    loaded = qrecipe.load_quantized(path, model)
    engines = own_engines(loaded)
    assert {name: engines.get(each) for name, each in loaded.named_children()} == {
        "groups": "onednn",
        "wide": "fbgemm",
    }
    assert torch.equal(loaded(x), converted(x))


@pytest.mark.vnni  # without it, the audit finds the kernel, and there is no file
def test_they_are_refused_where_none_is_right(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=3)).eval()
    path = tmp_path / "model.safetensors"
    affine = '[tensor.weight]\nqscheme = "per_channel_affine"\n'
    with monkeypatch.context() as as_before:
        as_before.setattr("qrecipe.planning.fbgemm_groups.overruns", lambda _: False)
        qrecipe.save_quantized(quantized(model, torch.randn(2, 12, 6, 6), affine), path)
    made_by_another_release(path, None)
    assert "0 has no kernel that is right: fbgemm's kernel" in refused(path, model, "QR505")
