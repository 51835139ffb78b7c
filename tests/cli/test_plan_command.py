"""``qrecipe plan`` and ``qrecipe explain``."""

from __future__ import annotations

import json
import re
import sys

import pytest
from command_line import DYNAMIC, STATIC, run


def test_plan_lists_the_sites_and_keeps_what_the_model_prints_apart(folder):
    result = run("plan", STATIC, "--model", "model.py:factory")
    assert result.exit_code == 0, result.stderr
    assert "loading model" in result.stderr
    assert "loading model" not in result.stdout
    assert "Conv2d" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    plan = json.loads(run("plan", STATIC, "--model", "model:factory", "--json").stdout)
    assert [site["name"] for site in plan["sites"]] == ["conv", ":mean", "fc"]


def test_plan_takes_random_inputs_of_a_shape(folder):
    assert run("plan", STATIC, "--model", "model:bare", "--input", "2x3x8x8").exit_code == 0
    without = run("plan", STATIC, "--model", "model:bare")
    assert without.exit_code == 2
    assert "--input 1x3x224x224" in without.stderr


@pytest.mark.parametrize("shape", ["", "3,8", "0x3", "1x-3", "9999999999x9999999999", "x", "٣x٣"])
def test_shape_that_is_none_is_a_usage_error(folder, shape):
    result = run("plan", STATIC, "--model", "model:bare", "--input", shape)
    assert result.exit_code == 2
    assert "is not a shape" in result.stderr


def test_plan_with_errors_is_shown_and_the_findings_are_on_stderr(folder):
    rules = '[rules.module_name]\n"convv" = "float"\n"fcc" = "float"\n'
    (folder / "top.toml").write_text(f'format = 1\nextends = "{STATIC}"\n{rules}')
    result = run("plan", "top.toml", "--model", "model.py:factory")
    assert result.exit_code == 1
    assert "unmatched" in result.stdout
    assert result.stderr.count("QR301") == 2
    document = run("plan", "top.toml", "--model", "model.py:factory", "--json").stdout
    assert [finding["code"] for finding in json.loads(document)["findings"]] == ["QR301"] * 2


_DATA = ("--data", "model.py:batches")


@pytest.mark.parametrize(
    "command",
    [
        ("plan",),
        ("plan", "--strict"),
        ("lock",),
        ("quantize", *_DATA),
        ("export", *_DATA, "--to", "pt2", "--out", "model.pt2"),
        ("sensitivity", *_DATA),
    ],
)
def test_each_finding_about_a_plan_with_errors_is_shown_once(folder, command):
    (folder / "faulty.toml").write_text(
        f'format = 1\nextends = "{STATIC}"\nrules.module_name.convolution = "float"\n'
    )
    name, *others = command
    done = run(name, "faulty.toml", *others, "--model", "model.py:factory")
    assert re.findall(r"\bQR\d{3}\b", done.output) == ["QR208", "QR301"]


@pytest.mark.parametrize(
    "command",
    [
        ("plan",),
        ("quantize", *_DATA),
        ("export", *_DATA, "--to", "pt2", "--out", "model.pt2"),
    ],
)
def test_warnings_that_are_errors_are_shown_once(folder, command):
    name, *others = command
    done = run(name, STATIC, *others, "--model", "model.py:factory", "--strict")
    assert re.findall(r".*\bQR\d{3}\b", done.output) == ["error: QR208"]
    assert "3 sites, 2 quantized" in done.stdout


def test_explain_tells_the_rule_of_a_member(folder):
    result = run("explain", STATIC, "norm", "--model", "model.py:factory")
    assert result.exit_code == 0, result.stderr
    assert "norm is a member of this fused group" in result.stdout
    assert "global = int8" in result.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_explain_explains_in_spite_of_errors_and_shows_them(folder, as_json):
    text = f'format = 1\nextends = "{STATIC}"\n[rules.module_name]\nnorm = "float"\n'
    (folder / "wrong.toml").write_text(text)
    result = run("explain", "wrong.toml", "norm", "--model", "model.py:factory", *as_json)
    assert result.exit_code == 1
    assert re.findall(r"\bQR\d{3}\b", result.stderr) == ["QR304"]
    assert 'write the rule for "conv"' in result.stderr
    if as_json:
        document = json.loads(result.stdout)
        assert [site["name"] for site in document["sites"]] == ["conv"]
        assert [finding["code"] for finding in document["findings"]] == ["QR304"]
    else:
        assert result.stdout.startswith("conv  ")
        assert "norm is a member of this fused group" in result.stdout


def test_explain_of_an_unknown_name_suggests_without_the_whole_plan(folder):
    result = run("explain", STATIC, "convv", "--model", "model.py:factory")
    assert result.exit_code == 1
    assert "QR310" in result.stderr
    assert 'did you mean "conv"?' in result.stderr
    assert result.stdout == ""


def test_explain_as_json_gives_the_sites_that_a_name_stands_for(folder):
    result = run("explain", STATIC, "norm", "--model", "model.py:factory", "--json")
    document = json.loads(result.stdout)
    assert document["name"] == "norm"
    assert [site["name"] for site in document["sites"]] == ["conv"]
    assert document["sites"][0]["qconfig"]["weight"]["dtype"] == "int8"


TOKENS = """
import torch
from torch import nn

def tokens():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval()
"""


@pytest.mark.parametrize("command", [("plan", DYNAMIC), ("quantize", DYNAMIC), ("suggest",)])
def test_random_inputs_that_do_not_fit_are_explained(folder, command):
    (folder / "tokens.py").write_text(TOKENS)
    result = run(*command, "--model", "tokens.py:tokens", "--input", "2x3")
    sys.modules.pop("tokens", None)
    assert result.exit_code == 1
    assert "QR307" in result.stderr
    told = " ".join(result.stderr.split())
    assert "--input makes random float32 tensors" in told
    assert "return (model, example_inputs) from the function of --model" in told
