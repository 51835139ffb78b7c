"""``qrecipe quantize``."""

from __future__ import annotations

import json

import pytest
from command_line import DYNAMIC, STATIC, run


def test_a_model_is_quantized_into_a_pipe_without_colours_and_progress(folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = ("--model", "model.py:factory", "--data", "model.py:batches")
    evaluated = ("--evaluate", "model.py:accuracy", "--threads", "1")
    done = run("quantize", STATIC, *model, *evaluated)
    assert done.exit_code == 0, done.stderr
    assert "3 sites, 2 quantized, 1 passthrough, 0 float" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "calibrating" not in done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["accuracy"] == ["accuracy", "4", "4", "+0"]
    assert float(rows["tensors"][5]) > 2
    assert "1 thread" in done.stdout


def test_quantize_as_json_is_one_document(folder):
    model = ("--model", "model.py:factory", "--data", "model.py:batches")
    result = run("quantize", STATIC, *model, "--evaluate", "model.py:accuracy", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    measured = {"metric", "tensor_bytes", "latency", "output_sqnr_db"}
    assert set(document) == {"plan", "calibration", *measured}
    assert document["calibration"] == {
        "batches": 10,
        "first_weight": pytest.approx(0.99**9),
        "clipping": None,
    }
    assert document["metric"] == {"name": "accuracy", "float": 4.0, "quantized": 4.0}
    assert document["tensor_bytes"]["quantized"] < document["tensor_bytes"]["float"]
    assert document["latency"]["ratio"] > 0
    assert document["output_sqnr_db"] > 15


def test_quantize_shows_warnings_as_plain_lines(folder):
    (folder / "few.py").write_text("import torch\ndef few():\n    yield torch.ones(2, 3, 8, 8)\n")
    result = run("quantize", STATIC, "--model", "model.py:training", "--data", "few.py:few")
    assert result.exit_code == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["QR202", "QR201"]
    assert "QRecipeWarning" not in result.stderr


def test_static_recipe_without_data_asks_for_them(folder):
    result = run("quantize", STATIC, "--model", "model.py:factory")
    assert result.exit_code == 2
    assert "--data" in result.stderr


@pytest.mark.parametrize("factory", ["factory", "bare"])
def test_batches_with_labels_get_a_hint_for_the_command_line(folder, factory):
    model = f"model.py:{factory}"
    result = run("quantize", STATIC, "--model", model, "--data", "model.py:labelled")
    assert result.exit_code == 1
    assert "QR402" in result.stderr
    assert "without labels" in result.stderr
    assert "forward=" not in result.stderr


def test_evaluation_that_gives_no_number_says_so(folder):
    model = ("--model", "model.py:factory", "--data", "model.py:batches")
    result = run("quantize", STATIC, *model, "--evaluate", "model.py:named")
    assert result.exit_code == 1
    assert "QR601 named() returns a str, not a number" in result.stderr


def test_quantize_says_on_how_many_batches_and_what_the_first_of_them_weighs(folder):
    data = ["--model", "model.py:factory", "--data", "model.py:batches"]
    result = run("quantize", STATIC, *data)
    averaged = " ".join(result.stdout.split())
    assert "10 batches, of which the first weighs 91% in moving averages" in averaged
    assert 'QR234: use about 100 batches, or observe with "minmax"' in averaged
    assert "weighs" not in result.stderr
    accepted = f'format = 1\nextends = "{STATIC}"\nlint.ignore = ["QR208", "QR234"]\n'
    (folder / "small.toml").write_text(accepted)
    strict = run("quantize", "small.toml", *data, "--strict")
    assert strict.exit_code == 0, strict.stderr
    assert "QR234" not in strict.stdout
    extremes = " ".join(run("quantize", f"{STATIC}-minmax", *data).stdout.split())
    assert "Calibrated on 10 batches." in extremes


def test_quantize_says_where_it_wrote_the_model(folder):
    saving = ("quantize", DYNAMIC, "--model", "model.py:factory", "--out", "net.safetensors")
    assert run(*saving).stdout.endswith("\nwritten to net.safetensors\n")
    assert json.loads(run(*saving, "--force", "--json").stdout)
