"""``qrecipe tune``."""

from __future__ import annotations

import json
import sys

import pytest
from test_cli import STATIC, folder, run

assert folder  # the fixture

CLOSENESS = """
import torch
import model

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EXPECTED = model.bare()(IMAGES).detach()

def closeness(net):
    with torch.no_grad():
        return -float((net(IMAGES) - EXPECTED).abs().mean() / EXPECTED.abs().mean())
"""


@pytest.fixture
def call(folder, monkeypatch):
    # another test's module of that name would be what `import model` gives
    monkeypatch.delitem(sys.modules, "model", raising=False)
    (folder / "closeness.py").write_text(CLOSENESS)
    (folder / "quick.toml").write_text(f'format = 1\nextends = "{STATIC}"\n')
    named = ("--model", "model.py:factory", "--data", "model.py:batches")
    return ("tune", "quick.toml", *named, "--evaluate", "closeness.py:closeness")


def test_tune_shows_the_trials_and_writes_a_recipe_that_quantizes(folder, call):
    result = run(*call, "--max-drop", "0.5", "--out", "tuned.toml")
    assert result.exit_code == 0, result.stderr
    assert "the recipe as it is" in result.stdout
    assert "Reached" in result.stdout
    assert "written to tuned.toml" in result.stdout
    assert "drawing batches" not in result.stdout
    assert 'extends = "./quick.toml"' in (folder / "tuned.toml").read_text()
    assert run("check", "tuned.toml").exit_code == 0


def test_a_missed_budget_is_exit_status_1_and_the_best_is_written(folder, call):
    result = run(*call, "--max-drop", "0", "--out", "tuned.toml", "--json")
    assert result.exit_code == 1
    assert "QR219" in result.stderr
    document = json.loads(result.stdout)
    assert document["reached"] is False
    assert document["distance"] > 0
    assert document["out"] == "tuned.toml"
    assert run("check", "tuned.toml").exit_code == 0
    planned = run("plan", "tuned.toml", "--model", "model.py:factory", "--json")
    sites = json.loads(planned.stdout)["sites"]
    float_sites = {site["name"] for site in sites if "quantized alone" in (site["reason"] or "")}
    assert float_sites == set(document["float_sites"])


def test_a_log_bounds_and_continues_a_search(folder, call):
    first = run(*call, "--max-drop", "0", "--max-trials", "1", "--log", "log.json", "--json")
    assert json.loads(first.stdout)["stopped"] == "trials"
    assert len(json.loads((folder / "log.json").read_text())["trials"]) == 1
    second = json.loads(run(*call, "--max-drop", "0", "--log", "log.json", "--json").stdout)
    assert second["stopped"] is None
    trials = json.loads((folder / "log.json").read_text())["trials"]
    assert [trial["metric"] for trial in trials] == [trial["metric"] for trial in second["trials"]]
    assert second["trials"][0] == json.loads(first.stdout)["trials"][0]


@pytest.mark.parametrize(
    "options", [("--max-drop", "-1"), ("--max-trials", "0"), ("--max-seconds", "0")]
)
def test_bounds_that_make_no_sense_are_wrong_usage(call, options):
    assert run(*call, *options).exit_code == 2


def test_labelled_batches_get_the_hint_of_the_command_line(folder, call):
    labelled = [part.replace("model.py:batches", "model.py:labelled") for part in call]
    result = run(*labelled)
    assert result.exit_code == 1
    assert "let the function of --data give" in result.stderr
