"""``qrecipe bench``."""

from __future__ import annotations

import json
import shlex

import pytest
from command_line import STATIC, run

from qrecipe.deployment.verdict import Verdict
from qrecipe.errors.findings import Finding
from qrecipe.runtimes import table

NAMED = ("--model", "model.py:bare", "--data", "model.py:batches")
TORCH = ("--runtime", "torch")


def test_bench_shows_rows_the_fastest_and_its_command_which_works(folder):
    result = run("bench", STATIC, *NAMED, *TORCH, "--batch", "1", "--html", "runtimes.html")
    assert result.exit_code == 0
    assert "drawing batches" not in result.stdout
    assert "Fastest: torch" in result.stdout
    assert "1 thread" in result.stdout
    assert "[1, 3, 8, 8]" in result.stdout
    command = result.stdout.strip().splitlines()[-1].strip()
    named = " ".join(NAMED)
    assert command == f"qrecipe quantize {STATIC} {named} --out model.safetensors"
    assert run(*shlex.split(command)[1:]).exit_code == 0
    assert (folder / "model.safetensors").exists()
    page = (folder / "runtimes.html").read_text()
    assert "<h2>Time of one call</h2>" in page
    assert "<h2>Recipe</h2>" in page


def test_bench_as_json_is_one_document(folder):
    result = run("bench", STATIC, *NAMED, *TORCH, "--json", "--evaluate", "model.py:accuracy")
    document = json.loads(result.stdout)
    assert [row["runtime"] for row in document["rows"]] == ["torch", "torch"]
    assert document["metric"] == "accuracy"
    assert document["conditions"]["threads"] == 1


def test_a_runtime_that_computes_otherwise_sets_the_exit_status(folder, monkeypatch):
    wrong = Verdict((Finding("QR414", "torch int8 computes something else"),))
    monkeypatch.setattr("qrecipe.deployment.bench.verdict_of", lambda *given: wrong)
    result = run("bench", STATIC, *NAMED, *TORCH)
    assert result.exit_code == 1
    assert "QR414 torch int8 computes something else" in result.stdout


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--strict",), 1)])
def test_a_runtime_that_fails_is_an_error_for_strict_alone(options, status, folder, monkeypatch):
    def fails(*given):
        raise RuntimeError("it broke")

    monkeypatch.setattr("qrecipe.deployment.ways.save_quantized", fails)
    result = run("bench", "builtin:x86-static-minmax", *NAMED, *TORCH, *options)
    assert "torch int8 failed: it broke" in result.stdout
    assert result.exit_code == status


def test_a_misspelt_runtime_gets_the_nearest_word(folder):
    result = run("bench", STATIC, *NAMED, "--runtime", "openvin")
    assert result.exit_code == 2
    assert "Did you mean 'openvino'?" in result.stderr


def test_an_x86_recipe_is_exported_to_executorch(folder):
    pytest.importorskip("executorch.runtime")
    result = run("export", STATIC, *NAMED, "--to", "pte", "--out", "model.pte")
    assert result.exit_code == 0, result.stderr
    assert "executorch" in result.stdout


@pytest.mark.parametrize("installed", [("onnxruntime", "openvino"), ("onnxruntime",), ()])
def test_quantize_names_bench_where_a_faster_runtime_is_installed(installed, folder, monkeypatch):
    packages = ("onnx", "onnxscript", *installed)
    monkeypatch.setattr(table, "find_spec", lambda name: name if name in packages else None)
    titles = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    note = "may run this faster than torch: qrecipe bench measures it"
    static = run("quantize", STATIC, *NAMED).stdout
    dynamic = run("quantize", "builtin:x86-dynamic", *NAMED).stdout
    assert [title for title in titles.values() if f"{title} {note}" in static] == [
        titles[name] for name in installed[-1:]
    ]
    assert note not in dynamic


def test_suggest_names_bench_on_a_terminal_and_not_in_a_pipe(folder, monkeypatch):
    monkeypatch.setattr(
        "qrecipe.planning.faster_runtime.faster_runtime", lambda **given: "try bench"
    )
    assert "try bench" not in run("suggest", "--model", "model.py:factory").output
    said = []
    monkeypatch.setattr("qrecipe.cli.tune.hint", said.append)
    run("suggest", "--model", "model.py:factory", "--out", "net.toml")
    assert said == ["try bench"]
