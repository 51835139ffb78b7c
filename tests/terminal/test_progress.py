"""Progress of long work on a terminal."""

from __future__ import annotations

import io

import pytest

from qrecipe.errors.findings import ExecutionError
from qrecipe.terminal import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_what_is_done_and_how_long_the_rest_will_take(monkeypatch):
    now = [0.0]
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    show = progress.terminal_progress("measuring")
    for done, at in ((1, 0.5), (2, 40.0), (4, 80.0)):
        now[0] = at
        show(done, 4)
    lines = [line.rstrip() for line in terminal.getvalue().split("\r")[1:]]
    assert lines == ["measuring 1/4", "measuring 2/4, 0:40 left", "measuring 4/4"]
    assert terminal.getvalue().endswith("\n")


def test_no_time_is_promised_where_the_end_is_not_known(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    progress.terminal_progress("comparing")(3, None)
    assert terminal.getvalue().strip() == "comparing 3"


def test_the_number_of_steps_is_said_once_it_is_known(monkeypatch):
    steps = []
    told = list(progress.tracked("abc", lambda *step: steps.append(step), 3))
    assert told == [(0, "a"), (1, "b"), (2, "c")]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    steps.clear()
    list(progress.tracked(iter("ab"), lambda *step: steps.append(step), None))
    assert steps == [(1, None), (2, None), (2, 2)]  # so that the line ends


def test_a_pipe_is_told_nothing(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", pipe)
    progress.terminal_progress("comparing")(3, 4)
    assert pipe.getvalue() == ""


def test_what_takes_long_is_named_while_it_runs(monkeypatch):
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.activity("converting"):
        assert terminal.getvalue() == "converting …\r"
    assert terminal.getvalue().endswith(" \r")
    monkeypatch.setattr(progress.sys, "stderr", pipe)
    with progress.activity("converting"):
        pass
    assert pipe.getvalue() == ""


def test_false_is_silence_and_true_is_the_default(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    progress.chosen_progress(False, "comparing")(1, 4)
    assert terminal.getvalue() == ""
    for given in (True, None):
        progress.chosen_progress(given, "comparing")(1, 4)
    assert terminal.getvalue().count("comparing 1/4") == 2


def test_a_function_is_called_itself_and_anything_else_is_a_finding():
    steps = []
    progress.chosen_progress(lambda *step: steps.append(step), "comparing")(1, None)
    assert steps == [(1, None)]
    with pytest.raises(ExecutionError, match='QR425 progress is a function or a bool, not "int"'):
        progress.chosen_progress(3, "comparing")
