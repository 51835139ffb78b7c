"""The help: whole summaries, no Python types, `help COMMAND`, completion by the shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from command_line import run

from qrecipe.cli.app import _COMMANDS


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_summary_of_each_command_is_whole(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = run("--help").stdout
    assert "..." not in text.partition("Commands:")[2]
    assert "stored or exported model, without torch." in " ".join(text.split())


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_names_what_to_write_and_no_python_types(command):
    text = run(command, "--help").stdout
    assert re.findall(r"<(?:list|str|int|float|bool)\b[^>]*>", text) == []
    assert run("help", command).stdout.strip() == text.strip()


def test_help_alone_lists_the_commands():
    assert run("help").stdout.strip() == run("--help").stdout.strip()


def test_help_for_a_command_that_does_not_exist_names_the_nearest():
    result = run("help", "chekc")
    assert result.exit_code == 2
    assert "there is no command 'chekc'. Did you mean 'check'?" in result.stderr


def test_a_shell_completes_commands_and_options():
    def completed(words, position):
        variables = {
            "_QRECIPE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        done = subprocess.run(
            [sys.executable, "-m", "qrecipe"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert completed("qrecipe pl", 1) == ["plan"]
    assert "--all-rules" in completed("qrecipe plan --a", 2)
    assert "--show-completion" in run("--help").stdout
