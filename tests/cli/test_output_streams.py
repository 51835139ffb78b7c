"""What becomes of a command whose output cannot be written, or is not wanted."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from itertools import product

import pytest
from places import ROOT
from shares import every

from qrecipe.terminal.progress import terminal_progress
from qrecipe.terminal.tables import render_table, room_beside

SOUND = "check recipes/x86-static.toml"
WRITING = (SOUND, "show builtin:x86-static", "check --help")
NO_SPACE = "QR431 cannot write to the standard output: no space left on device\n"
is_linux = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device is Linux's")


def shell(command: str, redirection: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of qrecipe in a shell; its status is the program's own."""
    program = f"{shlex.quote(sys.executable)} -m qrecipe {command} {redirection}"
    return subprocess.run(
        ["bash", "-c", f"{program}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("case", every(4, product(("", "1"), WRITING)))
def test_a_pipe_that_nobody_reads_ends_a_command_in_silence(case):
    unbuffered, command = case
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "qrecipe", *command.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_first_lines_alone_can_be_read():
    done = shell("show builtin:x86-static", "| head -1")
    assert done.stdout.startswith("# builtin:x86-static, fingerprint ")
    assert done.stderr == ""


@is_linux
@pytest.mark.parametrize(
    "case", every(4, product(("", "1"), (SOUND, "check --json nowhere.toml", "--version")))
)
def test_a_full_device_is_one_line_and_no_success(case):
    unbuffered, command = case
    done = shell(command, "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr.endswith(NO_SPACE)
    assert "Traceback" not in done.stderr
    assert done.stderr.count(NO_SPACE) == 1


@pytest.mark.parametrize(
    ("command", "status", "closed"),
    [
        (SOUND, 0, ">&-"),
        ("check nowhere.toml", 1, ">&- 2>&-"),
        pytest.param(SOUND, 0, ">&- 2>&-", marks=pytest.mark.slow),
        pytest.param("check nowhere.toml", 1, ">&-", marks=pytest.mark.slow),
    ],
)
def test_closed_streams_leave_the_exit_status(command, status, closed):
    done = shell(command, closed)
    assert (done.returncode, done.stderr) == (status, "")


def test_the_library_renders_in_a_process_without_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    table, room = render_table(("site",), [("conv",)]), room_beside([("site",)], 30)
    terminal_progress("measuring")(1, 2)
    monkeypatch.undo()
    assert table.splitlines() == ["site", "────", "conv"]
    assert room == 30
