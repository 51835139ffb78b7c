"""``qrecipe suggest``."""

from __future__ import annotations

import json

from command_line import run

import qrecipe


def test_the_command_prints_a_recipe_that_can_be_planned(folder):
    printed = run("suggest", "--model", "model.py:factory")
    assert printed.exit_code == 0
    (folder / "printed.toml").write_text(printed.stdout)
    assert run("plan", "printed.toml", "--model", "model.py:factory").exit_code == 0
    written = run("suggest", "--model", "model.py:factory", "--out", "own.toml")
    assert written.exit_code == 0
    assert written.stdout == "written to own.toml\n"
    assert (folder / "own.toml").read_text() == printed.stdout


def test_the_command_takes_the_shape_of_an_input(folder):
    done = run("suggest", "--model", "model.py:bare", "--input", "2x3x8x8")
    assert 'extends = "builtin:x86-static"' in done.stdout


def test_the_command_gives_the_recipe_as_json(folder):
    document = json.loads(run("suggest", "--model", "model.py:factory", "--json").stdout)
    assert qrecipe.parse_recipe(document["recipe"]).fingerprint == document["fingerprint"]
    assert document["out"] is None


def test_the_command_without_inputs_is_wrong_usage(folder):
    assert run("suggest", "--model", "model.py:bare").exit_code == 2


def test_the_command_takes_the_number_of_batches(folder):
    done = run("suggest", "--model", "model.py:factory", "--batches", "8")
    assert 'extends = "builtin:x86-static-minmax"' in done.stdout
