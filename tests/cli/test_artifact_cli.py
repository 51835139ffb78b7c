"""Stored models on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import assert_same_outputs, parts, quantized, recipe, stored, with_header
from command_line import run
from nets import NETS
from places import ROOT

import qrecipe

MODEL = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.ones(2, 6)

def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 6) for _ in range(10)]
"""


def without_torch(*arguments):
    """The command in a process that has no torch, numpy or safetensors."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'safetensors']))\n"
        "from qrecipe.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("stored"), "residual")


def test_inspect_shows_recipe_plan_and_versions_without_torch(file):
    done = without_torch("inspect", file)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert f"fingerprint {recipe().fingerprint}" in shown
    assert recipe().to_toml() in shown
    assert f"torch {torch.__version__}" in shown
    assert "checksum ok" in shown
    assert "layer1.0:add" in shown
    assert "Conv2d+BatchNorm2d+ReLU" in shown
    assert "conv1.weight_scale" in shown
    assert "torch's engines x86 and onednn" in shown


def test_inspect_as_json_is_one_document_with_the_plan_as_qrecipe_plan_gives_it(file):
    document = json.loads(without_torch("inspect", file, "--json").stdout)
    plan = qrecipe.plan(NETS["residual"].model(), recipe(), NETS["residual"].batches(1)[0])
    assert document["plan"]["sites"] == json.loads(plan.to_json())["sites"]
    assert document["fingerprint"] == recipe().fingerprint
    assert document["needs"] == {"engines": ["x86", "onednn"], "vnni": False}
    assert document["bytes"] == file.stat().st_size
    assert document["tensors"]["conv1.weight"] == {
        "dtype": "I8",
        "shape": [8, 3, 3, 3],
        "bytes": 216,
    }
    assert document["tensor_bytes"] == sum(t["bytes"] for t in document["tensors"].values())


def test_inspect_tells_that_the_cpu_needs_vnni(tmp_path):
    path = stored(
        tmp_path,
        "mlp",
        recipe(head='[tensor.activation]\nreduce_range = false\n[lint]\nignore = ["QR226"]'),
    )
    assert "a CPU with VNNI" in run("inspect", path).stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_inspect_of_a_damaged_file_ends_with_status_one(file, tmp_path, as_json):
    path = tmp_path / "damaged.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = run("inspect", path, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert "QR504" in result.stderr
    if as_json:
        (finding,) = json.loads(result.stdout)["findings"]
        assert finding["code"] == "QR504"


@pytest.mark.parametrize("name", ["nowhere.safetensors", "."])
def test_inspect_of_no_file_ends_with_status_one(name):
    result = run("inspect", name)
    assert result.exit_code == 1
    assert "QR502" in result.stderr


def test_quantize_saves_a_model_that_loads_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    arguments = ("--model", "model.py:factory", "--data", "model.py:batches")
    done = run("quantize", "builtin:x86-static", *arguments, "--out", "out.safetensors")
    assert done.exit_code == 0, done.stderr
    scope: dict = {}
    exec(MODEL, scope)
    model, _ = scope["factory"]()
    batches = scope["batches"]()
    expected = qrecipe.quantize(model, "builtin:x86-static", batches, progress=lambda *_: None)
    loaded = qrecipe.load_quantized("out.safetensors", scope["factory"]()[0])
    assert_same_outputs(expected, loaded, batches[0])


def test_help_of_inspect_has_examples():
    result = run("inspect", "--help")
    assert result.exit_code == 0
    assert "qrecipe inspect model.safetensors --json" in result.stdout


def test_a_name_that_steers_the_terminal_is_shown_as_plain_text(tmp_path):
    path = tmp_path / "model.safetensors"
    qrecipe.save_quantized(quantized(NETS["mlp"], recipe()), path)
    tensors, metadata, content = parts(path)
    tensors = {name.replace("fc1.bias", "fc1\x1b[31m\n.bias"): e for name, e in tensors.items()}
    path.write_bytes(with_header(tensors, metadata, content))
    result = run("inspect", path)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
