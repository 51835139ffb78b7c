"""No command overwrites a file unless it is asked to, and none works for what it cannot write."""

from __future__ import annotations

import re

import pytest
from command_line import STATIC, run
from nets import NETS
from runs import STATIC as RECIPE
from runs import silent

import qrecipe
from qrecipe.cli.app import _COMMANDS
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
    result = run(*COMMANDS[command], "--out", name, "--force")
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
        forced = ["--force"] if before else []
        result = run(*COMMANDS[command], "--out", name, *forced)
        assert result.exit_code == 0, result.stderr
        assert (folder / name).read_text() != before
        assert qrecipe.load_recipe(name).backend == "x86"


WRITING = {
    "bench": ["--html"],
    "compare": ["--html", "--plot"],
    "drift": ["--html", "--plot"],
    "export": ["--out"],
    "fastest": ["--out"],
    "lock": ["--lock"],
    "profile": ["--html", "--plot"],
    "quantize": ["--out"],
    "sensitivity": ["--html", "--out", "--plot"],
    "suggest": ["--out"],
    "tune": ["--html", "--out"],
}
SUFFIX = {"--html": ".html", "--lock": ".lock.toml", "--out": ".toml", "--plot": ".svg"}
NEEDED = {
    "lock": ("lock", "good.toml", "--model", "model.py:factory"),
    "suggest": ("suggest", "--model", "model.py:factory"),
    "export": ("export", "good.toml", *NAMED, "--to", "pt2"),
    **COMMANDS,
}


def needed(command, option):
    """What a command needs besides its output."""
    if (command, option) in {("sensitivity", "--html"), ("sensitivity", "--plot")}:
        return ("sensitivity", STATIC, *NAMED)
    return NEEDED.get(command, (command, "good.toml", *NAMED))


def test_every_output_of_a_command_is_looked_at_here():
    """But --log, which is resumed, and --pareto, which takes a new folder."""
    found = {
        name: [option for option in SUFFIX if re.search(rf"^  {option} FILE", text, re.MULTILINE)]
        for name in _COMMANDS
        if (text := run(name, "--help").stdout)
    }
    writing = {name: sorted(options) for name, options in found.items() if options}
    writing.pop("plan")  # it reads the lock file
    assert writing == WRITING


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name in WRITING for option in WRITING[name]]
)
def test_a_file_that_exists_is_kept_and_nothing_is_computed(folder, command, option):
    name = f"mine{SUFFIX[option]}"
    (folder / name).write_text("what I found\n")
    result = run(*needed(command, option), option, name)
    assert result.exit_code == 2
    assert f"{name}: it exists: name another file, or pass --force" in told(result)
    assert "drawing batches" not in result.stderr
    assert (folder / name).read_text() == "what I found\n"


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name in WRITING for option in WRITING[name]]
)
def test_a_file_that_cannot_be_written_is_known_before_the_work(folder, command, option):
    for name in (f"missing/mine{SUFFIX[option]}", f"folder{SUFFIX[option]}"):
        (folder / f"folder{SUFFIX[option]}").mkdir(exist_ok=True)
        result = run(*needed(command, option), option, name)
        assert result.exit_code == 2
        assert re.search("there is no such folder|it is a folder", told(result))
        assert "drawing batches" not in result.stderr
        assert result.stdout == ""


def test_a_quantized_model_is_replaced_by_force(folder):
    for options in ((), ("--force",)):
        result = run("quantize", "good.toml", *NAMED, "--out", "net.safetensors", *options)
        assert result.exit_code == 0, result.stderr


def test_a_lock_is_replaced_by_a_lock(folder):
    for _ in range(2):
        result = run("lock", "good.toml", "--model", "model.py:factory")
        assert result.exit_code == 0, result.stderr


def told(result):
    """What was written to stderr, as one line."""
    return " ".join(result.stderr.split())


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
