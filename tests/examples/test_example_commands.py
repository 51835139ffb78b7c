"""Each example has one command, which examples/README.md names and .ci/run runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from places import ROOT

README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| \[[^|]*\| `([^`|]+)` \|", README, flags=re.MULTILINE)
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_commands_of_the_page_are_those_that_ci_runs():
    function = re.search(r"^example_commands\(\) \{.*?^\}", CI, flags=re.MULTILINE | re.DOTALL)
    assert function is not None
    script = f"{function.group()}\nexample_commands"
    printed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.splitlines() == COMMANDS
    assert re.search(r"^ +while IFS= read -r command; do\n +step .*\$command", CI, re.MULTILINE)
    assert "done < <(example_commands)" in CI
    assert re.search(r"^both examples ", CI, re.MULTILINE)


def test_every_example_has_a_command_and_every_file_of_a_command_is_there():
    named = set(re.findall(r"examples/[\w/-]+\.(?:py|toml|ipynb)", " ".join(COMMANDS)))
    assert all((ROOT / name).is_file() for name in named)
    folders = {folder.name for folder in (ROOT / "examples").iterdir() if any(folder.glob("*.py"))}
    assert {name.split("/")[1] for name in named} == folders


@pytest.fixture
def digits_folder(monkeypatch):
    """The digits example's files, imported by their own names."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "digits"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("digits", "end_to_end", "rescale", "train", "train_quantized"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.mark.slow  # the command runs before each merge, and tests/artifact/ compares the outputs
def test_end_to_end_ships_a_file_that_loads_to_equal_outputs(digits_folder, capsys):
    digits_folder("end_to_end").main()
    printed = capsys.readouterr().out
    assert "10 of 12 sites quantized by builtin:x86-static" in printed
    assert "outputs equal when loaded: True" in printed


@pytest.mark.parametrize(
    ("arguments", "seeds"), [([], [0, 1, 2]), (["1"], [1]), (["0", "5"], [0, 5])]
)
def test_training_runs_the_seeds_that_are_named(digits_folder, monkeypatch, arguments, seeds):
    example = digits_folder("train_quantized")
    monkeypatch.setattr(sys, "argv", ["train_quantized.py", *arguments])
    monkeypatch.setattr(example.torch, "set_num_threads", lambda count: None)
    for name in ("calibrated", "trained"):
        monkeypatch.setattr(example, name, lambda model: model)
    monkeypatch.setattr(example, "evaluate", lambda model: 0.5)
    ran = []
    monkeypatch.setattr(example, "rescaled", lambda model, seed: ran.append(seed))
    example.main()
    assert ran == seeds
