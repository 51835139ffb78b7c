"""What the README shows is what the program does: its blocks run, and print what stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qrecipe
from qrecipe.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
GAP = "..."


def block(language, beginning=""):
    """The only block of a language that begins so."""
    (found,) = [text for kind, text in BLOCKS if kind == language and text.startswith(beginning)]
    return found


def squeezed(line):
    """A line of a table, whatever the width of its columns."""
    return re.sub(r"[ ─]+", " ", line).strip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in which the paths of the examples lead to them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def digits(monkeypatch):
    """The model of the blocks, and an example input."""
    monkeypatch.syspath_prepend(str(ROOT))
    scope = {}
    exec("from examples.digits.digits import factory", scope)
    return scope["factory"]()


def test_the_lines_of_python_run_and_keep_the_accuracy(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    exec(compile(block("python"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    (line,) = re.findall(r"^(0\.\d+) -> (0\.\d+)$", printed, re.MULTILINE)
    before, after = map(float, line)
    assert abs(before - after) <= 0.02
    (shown,) = re.findall(r"^evaluate +(\S+) +(\S+)", README, re.MULTILINE)
    assert [before, after] == pytest.approx([float(value) for value in shown], abs=0.02)
    assert qrecipe.load_recipe("builtin:x86-static").fingerprint in printed
    assert "block1.depthwise.1 is a member of this group" in printed


def test_the_plan_that_is_shown_is_the_plan(digits):
    shown, cost, _ = block("", "builtin:x86-static on x86").partition("          float ")
    assert cost
    model, example_inputs = digits
    plan = qrecipe.plan(model, "builtin:x86-static", example_inputs)
    printed = [squeezed(line) for line in str(plan).splitlines()]
    expected = [squeezed(line) for line in shown.strip().splitlines() if line != GAP]
    assert len(expected) >= 8
    assert [line for line in expected if line not in printed] == []
    places = [printed.index(line) for line in expected if line]
    assert places == sorted(places)


def test_the_recipe_is_without_findings_and_decides_what_it_says(folder, digits):
    path = folder / "digits-x86.toml"
    path.write_text(block("toml"), encoding="utf-8")
    result = CliRunner().invoke(app, ["check", path.name])
    assert result.exit_code == 0
    plan = qrecipe.plan(digits[0], qrecipe.parse_recipe(block("toml")), digits[1])
    found = {site.name: site for site in plan.sites}
    assert found["classifier"].verdict == "float"
    assert found["classifier"].reason == "the last layer decides"
    for name in ("block1.pointwise", "block2.pointwise"):
        assert found[name].qconfig.activation.observer.name == "histogram"
    assert {verdict.verdict for verdict in plan.rules} == {"applied"}


def test_the_error_is_the_very_text_of_the_program(folder):
    command, *shown = block("", "$ qrecipe plan").splitlines()
    wrong = block("toml").replace('"classifier"', '"clasifier"').replace("expect = 2", "expect = 3")
    (folder / "digits-x86.toml").write_text(wrong, encoding="utf-8")
    result = CliRunner().invoke(app, shlex.split(command)[2:])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [line for line in shown if line != GAP]


def test_every_command_and_file_that_is_named_is_there():
    commands = set(re.findall(r"`qrecipe (\w+)", README))
    assert {"check", "show", "plan", "explain", "list"} <= commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    links = re.findall(r"\]\(([^)]+)\)", README)
    scripts = re.findall(r"(?:benchmarks|examples)/[\w/]+\.py", README)
    assert links
    assert scripts
    assert [path for path in (*links, *scripts) if not (ROOT / path).exists()] == []
