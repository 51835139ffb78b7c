"""``qrecipe tune`` and ``qrecipe fastest``."""

from __future__ import annotations

import json
import re
import sys

import pytest
from browser import LAYOUT, PHONE, needs_chromium, seen
from command_line import STATIC, run
from runs import hurry

CLOSENESS = """
import sys
import torch
import model

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EXPECTED = model.bare()(IMAGES).detach()

def closeness(net):
    print("evaluated", file=sys.stderr)
    with torch.no_grad():
        return -float((net(IMAGES) - EXPECTED).abs().mean() / EXPECTED.abs().mean())
"""


@pytest.fixture
def call(folder, monkeypatch):
    # another test's module of that name would be what `import model` gives
    monkeypatch.delitem(sys.modules, "model", raising=False)
    hurry(monkeypatch)
    (folder / "closeness.py").write_text(CLOSENESS)
    (folder / "quick.toml").write_text(f'format = 1\nextends = "{STATIC}"\n')
    named = ("--model", "model.py:factory", "--data", "model.py:batches")
    return ("tune", "quick.toml", *named, "--evaluate", "closeness.py:closeness")


def test_tune_shows_the_trials_and_writes_a_recipe_that_quantizes(folder, call):
    result = run(*call, "--max-drop", "0.5", "--out", "tuned.toml", "--pareto", "front")
    assert result.exit_code == 0, result.stderr
    assert "the unchanged recipe" in result.stdout
    assert "Reached" in result.stdout
    assert "written to tuned.toml" in result.stdout
    assert "drawing batches" not in result.stdout
    assert 'extends = "./quick.toml"' in (folder / "tuned.toml").read_text()
    assert run("check", "tuned.toml").exit_code == 0
    assert run("check", "front/1.toml").exit_code == 0


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
    reasons = {s["name"]: s["reason"] for s in sites if s["rule"]["tier"] == "module_name"}
    assert reasons.keys() == set(document["float_sites"])
    ranked = {site["name"] for site in document["ranking"]}
    assert all("quantized alone" in reasons[name] for name in ranked & reasons.keys())


def test_a_log_bounds_and_continues_a_search(folder, call):
    first = run(*call, "--max-drop", "0", "--max-trials", "1", "--log", "log.json", "--json")
    assert json.loads(first.stdout)["stopped"] == "trials"
    assert len(json.loads((folder / "log.json").read_text())["trials"]) == 1
    second = json.loads(run(*call, "--max-drop", "0", "--resume", "log.json", "--json").stdout)
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
    assert "let the function of --data return" in result.stderr


SECTIONS = [
    "Result",
    "Trials",
    "Accuracy against latency",
    "Ranking, worst first",
    "Along the depth of the network",
    "The worst activations and their quantization ranges",
    "Ranking",
    "Trials in order",
    "The plan as a graph",
    "Plan",
    "Recipe",
    "Versions",
    "How to read this page",
]


def page_of(folder):
    """The headings of the page that a command has written, and its words."""
    html = (folder / "tuning.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", html)
    without_style = re.sub("<style>.*?</style>", "", html, flags=re.DOTALL)
    return headings, re.sub("<[^>]*>", " ", without_style)


def test_html_writes_a_page_of_the_tuned_recipe_with_the_ranking_of_the_search(
    folder, call, undrawn
):
    result = run(*call, "--max-drop", "0", "--html", "tuning.html", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    headings, words = page_of(folder)
    assert headings == SECTIONS
    assert "Tuning: quick.toml" in words
    assert "Not reached" in words
    assert "closeness" in words
    assert document["ranking"]
    assert all(site["reason"] in words for site in document["ranking"])
    assert all(trial["what"] in words for trial in document["trials"])
    assert "description" in words  # of the tuned recipe, which tells what was found


def test_a_search_that_needed_no_ranking_has_one_on_its_page(folder, call, undrawn):
    result = run(*call, "--max-drop", "9", "--html", "tuning.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["ranking"] == []
    headings, words = page_of(folder)
    assert headings == SECTIONS
    assert "dB when quantized alone" in words
    assert "Not available" not in words


def test_an_interrupted_search_has_its_page_without_further_work(folder, call, undrawn):
    text = (folder / "closeness.py").read_text()
    interrupting = text.replace("    with torch", "    CALLS.append(0)\n    stop()\n    with torch")
    stop = "\nCALLS = []\ndef stop():\n    if len(CALLS) == 3:\n        raise KeyboardInterrupt\n"
    (folder / "closeness.py").write_text(interrupting + stop)
    result = run(*call, "--max-drop", "0", "--html", "tuning.html")
    assert result.exit_code == 1
    assert "QR218" in result.stderr
    headings, words = page_of(folder)
    assert {"Result", "Plan", "Recipe", "Versions"} <= set(headings)
    assert words.count("Not available: the search was interrupted") == 2
    assert "Interrupted; with a log" in words


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--log", "missing/log.json"), "QR332"),
        (("--log", "."), "QR332"),
        (("--pareto", "model.py"), "QR001"),
        (("--pareto", "."), "QR001"),
        (("--pareto", "missing/front"), "QR001"),
    ],
)
def test_an_output_that_cannot_be_written_is_known_before_the_search(folder, call, options, code):
    before = (folder / "model.py").read_text()
    result = run(*call, *options)
    assert result.exit_code == 1
    assert code in result.stderr
    assert "evaluated" not in result.stderr
    assert result.stdout == ""
    assert (folder / "model.py").read_text() == before


@pytest.mark.parametrize(
    "options",
    [
        ("--out", "a.toml", "--log", "./a.toml"),
        ("--log", "a.json", "--html", "a.json"),
        ("--out", "a", "--html", "a"),
    ],
)
def test_one_file_for_two_outputs_is_wrong_usage(call, options):
    result = run(*call, *options)
    assert result.exit_code == 2
    assert "already writes this file" in result.stderr


def test_without_matplotlib_a_page_is_refused_before_the_search(folder, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(*call, "--html", "tuning.html")
    assert result.exit_code == 2
    assert "QR602" in result.stderr
    assert "drawing batches" not in result.stderr


def test_what_was_found_is_shown_and_written_though_the_page_cannot_be_made(folder, call):
    once = "import model\n_once = iter([model.batches()])\ndef first():\n    return next(_once)\n"
    (folder / "once.py").write_text(once)
    arguments = [part.replace("model.py:batches", "once.py:first") for part in call]
    options = ("--max-drop", "0.5", "--out", "tuned.toml", "--html", "tuning.html")
    result = run(*arguments, *options)
    assert result.exit_code == 1
    assert "Reached" in result.stdout
    assert "QR601" in result.stderr
    assert (folder / "tuned.toml").exists()
    assert not (folder / "tuning.html").exists()


@pytest.mark.browser
def test_chromium_shows_what_tune_has_written(folder, call):
    needs_chromium()
    run(*call, "--max-drop", "0", "--html", "tuning.html")
    layout = seen(folder / "tuning.html", PHONE, "dark", LAYOUT)
    assert len(layout["images"]) >= 4  # trials, latency, depth, activations
    assert layout["width"] <= PHONE
    assert layout["outside"] == layout["cut"] == layout["faint"] == []


NAMED = ("--model", "model.py:factory", "--data", "model.py:batches")


def test_fastest_says_what_it_measured_and_writes_a_recipe(folder, monkeypatch):
    hurry(monkeypatch)
    result = run("fastest", STATIC, *NAMED, "--threads", "1", "--out", "fast.toml")
    assert result.exit_code == 0, result.stderr
    assert "the recipe as it is" in result.stdout
    assert "1 thread, torch" in result.stdout
    assert "written to fast.toml" in result.stdout
    assert f'extends = "{STATIC}"' in (folder / "fast.toml").read_text()
    assert run("plan", "fast.toml", *NAMED[:2]).exit_code == 0


def test_fastest_as_json_is_one_document(folder, monkeypatch):
    hurry(monkeypatch)
    document = json.loads(run("fastest", STATIC, *NAMED, "--json").stdout)
    assert document["winner"] in ("recipe", "mixture", "float")
    assert document["out"] is None
    assert document["profile"]["conditions"]["rounds"] > 0
