"""Colour: on a terminal that has it, where the user wants it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from command_line import STATIC, run

from qrecipe.cli.colour import write
from qrecipe.errors.findings import Finding, Location

ESCAPE = re.compile(r"\x1b\[([\d;]*)m(.*?)\x1b\[0m", re.DOTALL)
GREEN, CYAN, YELLOW, RED = "32", "36", "33", "1;31"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def written(text):
    """The coloured parts of a text on a terminal: what, and the code of its colour."""
    terminal = Terminal()
    write(text, terminal)
    assert ESCAPE.sub(r"\2", terminal.getvalue()) == f"{text}\n"
    return [(words, code) for code, words in ESCAPE.findall(terminal.getvalue())]


def on_terminal(*words, **variables):
    """What a command writes to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "qrecipe", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **variables},
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    done.wait()
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_the_code_of_a_finding_and_its_caret_are_coloured_by_severity():
    at = Location("cnn.toml", 3, 1, 5, "conv = 1")
    assert written(str(Finding("QR301", "matches nothing", at, "did you mean conv1?"))) == [
        ("QR301", RED),
        ("^^^^", RED),
        (" did you mean conv1?", CYAN),
    ]
    assert written("warning: QR215 unused") == [("warning", "1;33"), ("QR215", "1;33")]
    assert written("error: QR215 unused")[0] == ("error", RED)


def test_verdicts_are_coloured_in_the_cells_of_a_table_and_nowhere_else():
    table = (
        "float  quantized\n─────  ─────────\n"
        "conv   quantized    int8/uint8  float is said here\n"
        "pool   passthrough  -/uint8\n"
        "head   float        float\n"
    )
    assert written(table) == [
        ("quantized", GREEN),
        ("passthrough", CYAN),
        ("float", YELLOW),
        ("float", YELLOW),
    ]
    assert written("3 sites, 1 quantized, 1 passthrough, 1 float") == []
    assert written("  verdict    quantized: int8/uint8") == [("quantized", GREEN)]


def test_a_text_with_brackets_and_colons_is_printed_as_it_is():
    assert written("[rules]\n:smile: [bold]x[/bold]") == []


@pytest.mark.parametrize(
    ("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")], ids=["NO_COLOR", "TERM=dumb"]
)
def test_no_colour_is_written_where_the_user_or_the_terminal_has_none(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert written("warning: QR215 unused") == []


def test_a_command_has_no_colour_on_a_terminal_that_has_none(folder):
    text = on_terminal("check", "bad.toml", TERM="dumb")
    assert "QR104" in text
    assert "\x1b" not in text


def test_a_command_is_coloured_on_a_terminal_and_says_the_same_in_a_pipe(folder):
    text = on_terminal("check", "bad.toml")
    assert ("QR104", RED) in [(words, code) for code, words in ESCAPE.findall(text)]
    assert ESCAPE.sub(r"\2", text) == run("check", "bad.toml").stdout
    assert "\x1b" not in run("plan", STATIC, "--model", "model.py:factory").stdout


def test_a_long_message_is_broken_between_words_on_a_terminal_alone(folder):
    text = (folder / "good.toml").read_text() + f'[rules.module_name]\n"{"a" * 30}" = "in8"\n'
    (folder / "long.toml").write_text(text)
    piped = run("check", "long.toml").stdout
    shown = on_terminal("check", "long.toml", COLUMNS="40", NO_COLOR="1")
    message = piped.splitlines()[0]
    assert len(message) > 40
    assert message not in shown
    assert message in " ".join(shown.split())
    assert shown.split() == piped.split()


def test_json_is_not_coloured_on_a_terminal(folder):
    assert "\x1b" not in on_terminal("check", "bad.toml", "--json")
