"""``qrecipe init``: files that run as they are, and cost no file of the user's."""

from __future__ import annotations

import json
import re
import sys

import pytest
from command_line import run

import qrecipe


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qrecipe.measure.turns._MAX_RUNS", 5)
    yield tmp_path
    for name in ("own", "net"):
        sys.modules.pop(name, None)


def test_what_it_writes_is_quantized_as_it_is_without_a_warning(empty):
    said = run("init")
    assert said.exit_code == 0
    assert {path.name for path in empty.iterdir()} == {"own.toml", "own.py"}
    assert run("check", "own.toml", "--strict").exit_code == 0
    lines = said.stdout.replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if line.startswith("  qrecipe quantize")]
    done = run(*command.split()[1:])
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"evaluate +1 +(1|0\.9\d+)", done.stdout)
    assert (empty / "own.safetensors").exists()


def test_the_next_commands_work(empty):
    lines = run("init").stdout.splitlines()
    for start in ("  qrecipe plan", "  qrecipe suggest"):
        (command,) = [line for line in lines if line.startswith(start)]
        done = run(*command.partition("#")[0].split()[1:])
        assert done.exit_code == 0, done.stderr


def test_what_the_recipe_has_in_comments_can_be_taken_out_of_them(empty):
    run("init")
    text = (empty / "own.toml").read_text()
    live = re.sub(r'^# (?=\[|"|\w+ = )', "", text, flags=re.MULTILINE)
    assert live.count("\n# ") < text.count("\n# ")
    (empty / "own.toml").write_text(live)
    plan = run("plan", "own.toml", "--model", "own.py:factory", "--json")
    assert plan.exit_code == 0, plan.stderr
    verdicts = {site["name"]: site["verdict"] for site in json.loads(plan.stdout)["sites"]}
    assert verdicts["8"] == "float"


def test_it_never_overwrites_and_writes_both_or_none(empty):
    (empty / "net.py").write_text("mine")
    done = run("init", "net")
    assert done.exit_code == 2
    assert "net.py: it exists" in done.stderr
    assert (empty / "net.py").read_text() == "mine"
    assert not (empty / "net.toml").exists()
    assert run("init", "net", "--force").exit_code == 0
    assert (empty / "net.py").read_text() != "mine"
    assert qrecipe.load_recipe("net.toml").name == "net"
    assert "net.py" in (empty / "net.toml").read_text()


def test_a_missing_folder_and_an_odd_name(empty):
    assert "there is no such folder" in run("init", "nowhere/net").stderr
    assert run("init", 'a "net"').exit_code == 0
    assert qrecipe.load_recipe('a "net".toml').name == 'a "net"'


def test_the_example_may_be_a_dict_of_keyword_inputs_as_its_docstring_says(empty):
    run("init")
    text = (empty / "own.py").read_text()
    text = text.replace(
        "return model.eval(), _images(8)", 'return model.eval(), {"input": _images(8)}'
    )
    text = text.replace("[_images(8) for _ in range(100)]", '[{"input": _images(8)}] * 10')
    (empty / "own.py").write_text(text)
    named = ("--model", "own.py:factory", "--data", "own.py:calibration")
    assert "dict of keyword inputs" in text
    assert "[_images" not in text
    done = run("quantize", "own.toml", *named)
    assert done.exit_code == 0, done.stderr
