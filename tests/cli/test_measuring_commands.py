"""``qrecipe compare``, ``qrecipe profile`` and ``qrecipe sensitivity``."""

from __future__ import annotations

import json

import pytest
from command_line import STATIC, run

NAMED = ("--model", "model.py:factory", "--data", "model.py:batches")


def test_compare_shows_a_table_and_the_output(folder):
    result = run("compare", STATIC, *NAMED, "--plot", "sites.png")
    assert result.exit_code == 0
    assert "activation dB" in result.stdout
    assert "output: SQNR" in result.stdout
    assert "drawing batches" not in result.stdout
    assert (folder / "sites.png").exists()


def test_compare_as_json_is_one_document(folder):
    result = run("compare", STATIC, *NAMED, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["batches"] == 10
    assert {"conv", "fc"} <= {site["name"] for site in document["sites"]}


def test_compare_evaluates_both_models(folder):
    evaluating = ("compare", STATIC, *NAMED, "--evaluate", "model.py:accuracy")
    assert "accuracy: 4 in float, 4 quantized (+0)\n" in run(*evaluating).stdout
    document = json.loads(run(*evaluating, "--json").stdout)
    assert document["metric"] == {"name": "accuracy", "float": 4.0, "quantized": 4.0}
    assert run(*evaluating, "--html", "sites.html").exit_code == 0
    assert "4 in float, 4 quantized (+0)" in (folder / "sites.html").read_text()
    refused = run("compare", STATIC, *NAMED, "--evaluate", "model.py:named")
    assert refused.exit_code == 1
    assert "QR601 named() returns a str, not a number" in refused.stderr


def test_profile_shows_sites_and_boundaries_and_writes_a_page(folder):
    result = run("profile", STATIC, *NAMED, "--html", "times.html", "--plot", "times.png")
    assert result.exit_code == 0
    assert "float/int8" in result.stdout
    assert "whole model: float" in result.stdout
    assert (folder / "times.png").exists()
    assert "<h2>Sites</h2>" in (folder / "times.html").read_text()


def test_profile_as_json_is_one_document(folder):
    document = json.loads(run("profile", STATIC, *NAMED, "--json").stdout)
    assert {"conv", "fc"} <= {site["name"] for site in document["sites"]}
    assert document["conditions"]["rounds"] > 0


def test_sensitivity_ranks_and_writes_an_overlay_that_quantizes(folder):
    result = run("sensitivity", STATIC, *NAMED, "--keep-float", "1", "--out", "overlay.toml")
    assert result.exit_code == 0
    assert "█" in result.stdout
    assert "written to overlay.toml" in result.stdout
    assert f'extends = "{STATIC}"' in (folder / "overlay.toml").read_text()
    assert run("check", "overlay.toml").exit_code == 0
    planned = json.loads(
        run("plan", "overlay.toml", "--model", "model.py:factory", "--json").stdout
    )
    left = [site for site in planned["sites"] if (site["reason"] or "").endswith("quantized alone")]
    assert len(left) == 1
    assert left[0]["verdict"] == "float"
    assert run("quantize", "overlay.toml", *NAMED).exit_code == 0


@pytest.mark.parametrize("method", ["exact", "estimate"])
def test_sensitivity_as_json_tells_estimates(folder, method):
    result = run("sensitivity", "good.toml", *NAMED, "--method", method, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["is_estimate"] is (method == "estimate")
    values = [site["sqnr_db"] for site in document["sites"]]
    assert len(values) == 2
    assert values == sorted(values)


def test_sensitivity_ranks_by_the_users_evaluation(folder):
    arguments = ("sensitivity", STATIC, *NAMED, "--evaluate", "model.py:accuracy", "--json")
    document = json.loads(run(*arguments).stdout)
    assert document["float_value"] == 4
    assert [site["value"] for site in document["sites"]] == [4, 4]
    failing = run("sensitivity", STATIC, *NAMED, "--evaluate", "model.py:named")
    assert failing.exit_code == 1
    assert "QR423" in failing.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--keep-float", "1"),
        ("--out", "overlay.toml"),
        ("--keep-float", "1", "--min-sqnr-db", "20", "--out", "overlay.toml"),
        ("--evaluate", "model.py:accuracy", "--min-sqnr-db", "20", "--out", "overlay.toml"),
        ("--evaluate", "model.py:accuracy", "--method", "estimate"),
        ("--method", "guess"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(folder, options):
    result = run("sensitivity", STATIC, *NAMED, *options)
    assert result.exit_code == 2
    assert not (folder / "overlay.toml").exists()


def test_an_interrupt_ends_with_the_partial_ranking_and_status_1(folder, interrupted):
    result = run("sensitivity", STATIC, *NAMED, "--json")
    assert result.exit_code == 1
    assert "QR212" in result.stderr
    assert json.loads(result.stdout)["partial"] is True


def test_labelled_batches_get_the_hint_of_the_command_line(folder):
    result = run(
        "sensitivity", STATIC, "--model", "model.py:factory", "--data", "model.py:labelled"
    )
    assert result.exit_code == 1
    assert "--data" in result.stderr


def test_what_was_not_measured_is_not_told(folder):
    evaluated = run("sensitivity", STATIC, *NAMED, "--evaluate", "model.py:accuracy").stdout
    assert "each quantized alone, measured by evaluate\n" in evaluated
    assert "each quantized alone, over 10 batches\n" in run("sensitivity", STATIC, *NAMED).stdout
    assert "of the int8 time" in run("compare", STATIC, *NAMED).stdout
    assert "of the int8 time" not in run("compare", "builtin:x86-dynamic", *NAMED).stdout


@pytest.mark.parametrize("command", ["compare", "sensitivity"])
def test_the_help_says_what_takes_the_time(command):
    assert "fewer" in run(command, "--help").stdout
