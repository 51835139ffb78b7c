"""A command that writes a recipe replaces recipes and nothing else."""

from __future__ import annotations

import pytest
from command_line import STATIC, run
from nets import NETS
from runs import STATIC as RECIPE
from runs import silent

import qrecipe
from qrecipe.errors.findings import RecipeReferenceError

NAMED = ("--model", "model.py:factory", "--data", "model.py:batches")
COMMANDS = {
    "sensitivity": ("sensitivity", STATIC, *NAMED, "--keep-float", "1"),
    "suggest": ("suggest", "--model", "model.py:factory"),
    "tune": ("tune", STATIC, *NAMED, "--evaluate", "model.py:accuracy", "--max-drop", "9"),
}
OTHERS = {
    "notes.txt": "what I found\n",
    "pyproject.toml": '[project]\nname = "mine"\n',
    "cnn.lock.toml": "lock = 1\n",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_recipe_is_kept_and_nothing_is_computed(folder, command, name):
    (folder / name).write_text(OTHERS[name])
    result = run(*COMMANDS[command], "--out", name)
    assert result.exit_code == 1
    assert f'QR001 "{name}" exists and is not a recipe: ' in result.stderr
    assert "name another file, or remove this one" in result.stderr
    assert result.stdout == ""
    assert "drawing batches" not in result.stderr
    assert (folder / name).read_text() == OTHERS[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_and_an_empty_file_are_replaced(folder, command):
    (folder / "empty.toml").touch()
    for name in ("good.toml", "empty.toml"):
        before = (folder / name).read_text()
        result = run(*COMMANDS[command], "--out", name)
        assert result.exit_code == 0, result.stderr
        assert (folder / name).read_text() != before
        assert qrecipe.load_recipe(name).backend == "x86"


READING = {
    "compare": ("compare", "over.toml", *NAMED, "--html"),
    "fastest": ("fastest", "over.toml", *NAMED, "--out"),
    "profile": ("profile", "over.toml", *NAMED, "--plot"),
    "quantize": ("quantize", "over.toml", *NAMED, "--out"),
    "sensitivity": ("sensitivity", "over.toml", *NAMED, "--keep-float", "1", "--out"),
    "tune": ("tune", "over.toml", *COMMANDS["tune"][2:], "--out"),
}


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("name", ["over.toml", "./good.toml"])
def test_no_command_writes_to_a_file_that_its_recipe_is_made_of(folder, command, name):
    (folder / "over.toml").write_text('format = 1\nextends = "./good.toml"\n')
    before = (folder / name).read_text()
    result = run(*READING[command], name)
    assert result.exit_code == 2
    assert "it is read from there" in result.stderr
    assert READING[command][-1] in result.stderr
    assert (folder / name).read_text() == before


@pytest.mark.parametrize("command", ["compare", "drift", "profile", "sensitivity"])
def test_a_plot_and_a_page_are_two_files(folder, command):
    result = run(command, "good.toml", *NAMED, "--plot", "out.svg", "--html", "./out.svg")
    assert result.exit_code == 2
    assert "--plot already writes this file" in result.stderr
    assert "drawing batches" not in result.stderr


def test_the_library_keeps_a_file_that_is_no_recipe_too(tmp_path):
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(10)
    ranking = qrecipe.sensitivity(model, RECIPE, batches, progress=silent)
    tuned = qrecipe.tune(model, RECIPE, batches, lambda _: 1.0, max_trials=1, progress=silent)
    notes = tmp_path / "notes.txt"
    notes.write_text("what I found")
    for save in (lambda: ranking.save_overlay(notes, 1), lambda: tuned.save(notes)):
        with pytest.raises(RecipeReferenceError, match="exists and is not a recipe"):
            save()
    assert notes.read_text() == "what I found"
