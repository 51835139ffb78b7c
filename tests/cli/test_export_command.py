"""``qrecipe export``."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import STATIC, run

from qrecipe.runtimes import executorch

pytestmark = pytest.mark.usefixtures("onnx_listed_once")

NAMED = ("--model", "model.py:factory", "--data", "model.py:batches")


@pytest.fixture
def stored(folder):
    pytest.importorskip("torchao")
    result = run("quantize", STATIC, *NAMED, "--executor", "pt2e", "--out", "net.safetensors")
    assert result.exit_code == 0, result.stderr
    return "net.safetensors"


@pytest.mark.parametrize("is_reopened", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_recipe_and_a_stored_model_give_the_same_program(
    folder, stored, is_reopened, monkeypatch
):
    if not is_reopened:  # in a fresh process
        target = "qrecipe.artifact.export.targets.check_reopened"
        monkeypatch.setattr(target, lambda *given: None)
    (folder / "one.pt2").write_text("mine")
    made = run("export", STATIC, *NAMED, "--to", "pt2", "--out", "one.pt2", "--force")
    assert made.exit_code == 0, made.stderr
    assert "written to one.pt2: " in made.stdout
    assert "executed by PT2E" in made.stdout
    stored_options = ("--model", "model.py:factory", "--to", "pt2")
    made = run("export", stored, *stored_options, "--out", "other.pt2", "--json")
    assert made.exit_code == 0, made.stderr
    document = json.loads(made.stdout)
    assert (document["file"], document["to"], document["lowering"]) == ("other.pt2", "pt2", None)
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        one, other = (torch.export.load(name).module()(x) for name in ("one.pt2", "other.pt2"))
    assert torch.equal(one, other)
    made = run("export", stored, *stored_options, "--out", "fixed.pt2", "--fixed-batch")
    assert made.exit_code == 0, made.stderr
    with pytest.raises(RuntimeError, match="shape"):
        torch.export.load("fixed.pt2").module()(torch.rand(7, 3, 8, 8))


@pytest.mark.slow
def test_onnx_is_written_from_a_recipe_by_any_executor_and_from_a_stored_program(stored):
    pytest.importorskip("onnxscript")
    sources = {
        "fx.onnx": (STATIC, *NAMED),
        "pt2e.onnx": (STATIC, *NAMED, "--executor", "pt2e"),
        "stored.onnx": (stored, "--model", "model.py:factory"),
    }
    for name, source in sources.items():
        made = run("export", *source, "--to", "onnx", "--out", name)
        assert made.exit_code == 0, made.stderr
        assert f"written to {name}" in made.stdout


@pytest.mark.slow
def test_openvino_is_written_from_a_stored_program(stored):
    pytest.importorskip("openvino")
    named = ("--model", "model.py:factory", "--to", "openvino", "--out", "net.xml")
    made = run("export", stored, *named)
    assert made.exit_code == 0, made.stderr
    stored_plan = json.loads(run("inspect", stored, "--json").stdout)["plan"]
    assert json.loads(run("inspect", "net.xml", "--json").stdout)["plan"] == stored_plan


def test_a_stored_model_of_graph_mode_is_exported_without_batches(folder):
    pytest.importorskip("onnxscript")
    made = run("quantize", STATIC, *NAMED, "--executor", "fx", "--out", "net.safetensors")
    assert made.exit_code == 0, made.stderr
    named = ("--model", "model.py:factory", "--to", "onnx", "--out", "stored.onnx")
    made = run("export", "net.safetensors", *named)
    assert made.exit_code == 0, made.stderr
    assert "drawing batches" not in made.stdout + made.stderr
    stored_plan = json.loads(run("inspect", "net.safetensors", "--json").stdout)["plan"]
    assert json.loads(run("inspect", "stored.onnx", "--json").stdout)["plan"] == stored_plan


@pytest.mark.slow
def test_what_a_compiler_made_is_said(stored):
    named = ("--model", "model.py:factory", "--to", "aoti", "--out", "net.pt2")
    made = run("export", stored, *named)
    assert made.exit_code == 0, made.stderr
    assert "Inductor made 2 integer kernels of the layers with weights in " in made.stdout
    made = run("export", stored, *named, "--force", "--json")
    lowering = json.loads(made.stdout)["lowering"]
    assert (lowering["layers"], lowering["without_kernel"]) == (2, [])


def test_the_recipe_is_not_written_over_even_if_forced(folder):
    result = run("export", "good.toml", *NAMED, "--to", "pt2", "--out", "good.toml", "--force")
    assert result.exit_code == 2
    assert "it is read from there" in result.stderr


def test_what_is_missing_is_said_before_anything_runs(folder, monkeypatch):
    monkeypatch.setattr(executorch, "MODULES", ("executorch_of_nobody",))
    result = run("export", "good.toml", *NAMED, "--to", "pte", "--out", "net.pte")
    assert result.exit_code == 2
    assert "QR602" in result.stderr
    assert "pip install --no-deps executorch" in result.stderr
    assert "loading" not in result.stderr


def test_targets_that_need_a_program_refuse_another_executor(folder):
    pytest.importorskip("torchao")
    result = run(
        "export", "good.toml", *NAMED, "--to", "pt2", "--out", "net.pt2", "--executor", "fx"
    )
    assert result.exit_code == 1
    assert "QR512" in result.stderr
    assert 'executor = "pt2e"' in result.stderr


def test_a_file_of_openvino_is_written_and_inspected(folder):
    pytest.importorskip("openvino")
    made = run("export", STATIC, *NAMED, "--to", "openvino", "--out", "net.xml", "--fixed-batch")
    assert made.exit_code == 0, made.stderr
    assert (folder / "net.bin").exists()
    shown = run("inspect", "net.xml")
    assert shown.exit_code == 0, shown.stderr
    assert "file      net.xml, OpenVINO, " in shown.stdout
    assert "conv" in shown.stdout
    document = json.loads(run("inspect", "net.xml", "--json").stdout)
    assert (document["kind"], document["plan"]["backend"]) == ("OpenVINO", "x86")
    (folder / "other.bin").write_text("mine")
    made = run("export", STATIC, *NAMED, "--to", "openvino", "--out", "other.xml")
    assert made.exit_code == 2
    assert "other.bin: it exists" in made.stderr


@pytest.mark.parametrize(
    ("source", "option", "value"),
    [
        ("stored", "--executor", "pt2e"),
        ("stored", "--target-cpu", "vnni"),
        (STATIC, "--constants", '{"times": 3}'),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(source, option, value, folder):
    (folder / "stored").write_bytes(b"\x10" + bytes(7) + b"{}")
    result = run("export", source, *NAMED, "--to", "pt2", "--out", "a.pt2", option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "loading" not in result.stderr
