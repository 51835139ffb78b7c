"""``qrecipe drift``, and the pages that measuring commands write."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from command_line import STATIC, run

NAMED = ("--model", "model.py:factory", "--data", "model.py:batches")
LATER = ("--model", "model.py:factory", "--data", "today.py:batches")
TODAY = """
import torch

def batches():
    return [torch.rand(2, 3, 8, 8) * 5 - 2 for _ in range(10)]
"""


@cache
def content():
    """A stored model, made in the folder of the first test that needs it."""
    assert run("quantize", STATIC, *NAMED, "--out", "model.safetensors").exit_code == 0
    return Path("model.safetensors").read_bytes()


@pytest.fixture
def stored(folder):
    """A stored model, and data that it was not calibrated on."""
    (folder / "model.safetensors").write_bytes(content())
    (folder / "today.py").write_text(TODAY)
    return folder


def test_data_like_those_of_calibration_end_with_status_0(stored):
    result = run("drift", "model.safetensors", *NAMED)
    assert result.exit_code == 0
    assert "0 of 3 stored ranges drifted over 10 batches." in result.stdout
    assert "drawing batches" not in result.stdout


def test_constants_are_a_json_object_with_arguments_of_forward(stored):
    result = run("drift", "model.safetensors", *NAMED, "--constants", "[1]")
    assert result.exit_code == 2
    assert "it is not a JSON object" in result.stderr
    result = run("drift", "model.safetensors", *NAMED, "--constants", '{"times": 3}')
    assert "QR507" in result.stderr
    assert "without a constant argument" in result.stderr


def test_other_data_end_with_status_1(stored):
    result = run("drift", "model.safetensors", *LATER)
    assert result.exit_code == 1
    assert "stored range" in result.stdout
    assert result.stderr == "loading model\ndrawing batches\n" or "QR" not in result.stderr


def test_the_threshold_decides(stored):
    document = json.loads(run("drift", "model.safetensors", *LATER, "--json").stdout)
    farthest = document["sites"][0]["moved"]
    assert (document["threshold"], document["max_clipped"]) == (0.5, 0.05)
    assert document["drifted"]
    assert farthest > 0.5
    above = ("drift", "model.safetensors", *LATER, "--threshold", str(farthest + 0.01))
    assert run(*above).exit_code == 1  # what is clipped is above its own
    assert run(*above, "--max-clipped", "1").exit_code == 0
    assert run("drift", "model.safetensors", *LATER, "--threshold", "0").exit_code == 1
    assert run("drift", "model.safetensors", *LATER, "--threshold", "-1").exit_code == 2
    assert run("drift", "model.safetensors", *LATER, "--max-clipped", "-1").exit_code == 2


@pytest.mark.parametrize("normal", [0, 9])
def test_one_batch_as_it_was_does_not_hide_nine_that_are_brighter(stored, normal):
    (stored / "mixed.py").write_text(
        "from model import batches as before\n\n"
        "def batches():\n"
        f"    return [b if at == {normal} else 5 * b for at, b in enumerate(before())]\n"
    )
    arguments = ("--model", "model.py:factory", "--data", "mixed.py:batches")
    result = run("drift", "model.safetensors", *arguments, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    entry = next(site for site in document["sites"] if site["tensor"] == "input")
    assert entry["clipped"] > 0.2
    assert {"name": entry["name"], "tensor": "input"} in document["drifted"]


def test_the_default_thresholds_are_those_of_the_library():
    import inspect

    from qrecipe.cli.drift import drift
    from qrecipe.measure.drift.report import DEFAULT_MAX_CLIPPED, DEFAULT_THRESHOLD

    parameters = inspect.signature(drift).parameters
    assert parameters["threshold"].default == DEFAULT_THRESHOLD
    assert parameters["max_clipped"].default == DEFAULT_MAX_CLIPPED


def test_a_file_that_is_none_of_ours_is_a_finding(stored):
    (stored / "other.safetensors").write_bytes(b"nothing")
    result = run("drift", "other.safetensors", *NAMED)
    assert result.exit_code == 1
    assert "QR503" in result.stderr


def test_a_dynamic_model_is_a_finding(stored):
    arguments = ("builtin:x86-dynamic", "--model", "model.py:factory", "--out", "d.safetensors")
    assert run("quantize", *arguments).exit_code == 0
    result = run("drift", "d.safetensors", *NAMED, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"][0]["code"] == "QR430"


@pytest.mark.parametrize(
    "arguments",
    [
        ("drift", "model.safetensors", *LATER),
        ("compare", STATIC, *NAMED),
        ("sensitivity", STATIC, *NAMED, "--evaluate", "model.py:accuracy"),
        ("compare", "builtin:x86-dynamic", *NAMED),
        *(
            pytest.param(("sensitivity", base, *NAMED), marks=pytest.mark.slow)
            for base in (STATIC, "builtin:x86-dynamic")
        ),
    ],
)
def test_html_writes_a_page(stored, arguments, undrawn):
    result = run(*arguments, "--html", "report.html")
    assert result.exit_code == (1 if arguments[0] == "drift" else 0)
    page = (stored / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<h2>Plan</h2>" in page
    versions = page[page.index("<h2>Versions</h2>") :]
    places = [versions.index(f">{name}<") for name in ("qrecipe", "torch", "python")]
    assert places == sorted(places)
    assert ("Not available: this model stores no activation ranges" in page) == (
        "dynamic" in arguments[1]
    )


@pytest.mark.parametrize("command", [("drift", "model.safetensors"), ("compare", STATIC)])
def test_a_page_takes_the_place_of_no_other_file(stored, command):
    before = (stored / "model.safetensors").read_bytes()
    result = run(*command, *LATER, "--html", "model.safetensors", "--force")
    assert result.exit_code == 1
    assert "QR431" in result.stderr
    assert "not an HTML page" in result.stderr
    assert "drawing batches" not in result.stderr
    assert (stored / "model.safetensors").read_bytes() == before


def test_a_plot_of_drift_is_written_too(stored):
    assert run("drift", "model.safetensors", *NAMED, "--plot", "drift.svg").exit_code == 0
    assert (stored / "drift.svg").exists()


def test_an_interrupted_ranking_has_its_page_without_further_work(stored, interrupted):
    result = run("sensitivity", STATIC, *NAMED, "--html", "report.html")
    assert result.exit_code == 1
    page = (stored / "report.html").read_text()
    assert "Not available: the measurement was interrupted" in page
    assert "Interrupted: the ranking covers what was measured so far." in page


def test_what_was_measured_is_shown_though_the_data_cannot_be_read_again(stored):
    once = TODAY + "\n_once = iter([batches()])\ndef first_time():\n    return next(_once)\n"
    (stored / "once.py").write_text(once)
    arguments = ("--model", "model.py:factory", "--data", "once.py:first_time")
    result = run("sensitivity", STATIC, *arguments, "--html", "report.html")
    assert result.exit_code == 1
    assert "dB alone" in result.stdout
    assert "QR601" in result.stderr
