"""``--pool``: where a command measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from command_line import run
from executors import AtOnce, Dying
from places import ROOT

RUN = ("builtin:x86-static", "--model", "model.py:factory", "--data", "model.py:batches")


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        ("process:4", "'process' is not a kind of pool. Did you mean 'processes'?"),
        ("4", "'4' is not a kind of pool."),
        ("processes", "'' is not a number of processes."),
        ("processes:0", "'0' is not a number of processes."),
        ("processes:-1", "'-1' is not a number of processes."),
        ("processes:two", "'two' is not a number of processes."),
        ("dask:", "the address of the scheduler is missing."),
    ],
)
def test_a_bad_pool_is_refused_before_anything_runs(folder, pool, text):
    result = run("sensitivity", *RUN, "--pool", pool)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert "Write processes:4, or dask:tcp://HOST:8786." in " ".join(result.stderr.split())


def test_an_estimate_takes_no_pool(folder):
    result = run("sensitivity", *RUN, "--method", "estimate", "--pool", "processes:2")
    assert result.exit_code == 2
    assert "--pool needs --method exact" in result.stderr


@pytest.mark.parametrize("command", ["sensitivity", "compare", "tune"])
def test_the_commands_measure_on_workers(folder, monkeypatch, command):
    made = []

    class Counted(AtOnce):
        def __init__(self, count):
            super().__init__()
            made.append(self)
            self._max_workers = count

    monkeypatch.setattr("qrecipe.cli.pool.Processes", Counted)
    more = ("--evaluate", "model.py:accuracy") if command == "tune" else ()
    alone = run(command, *RUN, *more, "--json", "--threads", "1")
    together = run(command, *RUN, *more, "--json", "--pool", "processes:3")
    assert together.exit_code == alone.exit_code, together.stderr
    assert len(made) == 1
    assert made[0]._max_workers == 3
    assert made[0].sent
    if command == "sensitivity":
        assert json.loads(together.stdout) == json.loads(alone.stdout)


@pytest.mark.parametrize(("command", "option"), [("sensitivity", "--log"), ("compare", "--resume")])
def test_a_command_whose_workers_die_goes_on_from_its_log(folder, monkeypatch, command, option):
    alone = run(command, *RUN, "--json", "--threads", "1")
    monkeypatch.setattr("qrecipe.measure.sensitivity.steps._AT_ONCE", 1)
    lives, made = iter([4, 0, 1000]), []

    class Mortal(Dying):
        def __init__(self, count):
            super().__init__(next(lives))
            made.append(self)

    monkeypatch.setattr("qrecipe.cli.pool.Processes", Mortal)
    pooled = (command, *RUN, "--json", "--pool", "processes:2", option, "log")
    died = run(*pooled)
    assert died.exit_code == 1
    assert "QR428 the workers failed after 4 pieces" in died.stderr
    assert len((folder / "log").read_text().splitlines()) == 1 + 4
    second = run(*pooled)
    assert without_times(second) == without_times(alone)
    pieces = [repr(piece) for each in made for piece in each.pieces]
    assert len(pieces) == len(set(pieces)) > 4


def without_times(result):
    document = json.loads(result.stdout)
    document.pop("conversion_share", None)
    for site in document["sites"]:
        site.pop("time", None)
    return document


def test_a_log_that_cannot_be_used_is_told_before_the_model_runs(folder):
    for command in ("sensitivity", "compare"):
        missing = run(command, *RUN, "--log", "missing/log")
        assert missing.exit_code == 2
        assert "there is no such folder" in " ".join(missing.stderr.replace("│", " ").split())
        recipe = run(command, "good.toml", *RUN[1:], "--log", "good.toml")
        assert recipe.exit_code == 2
        assert "it is read from there" in " ".join(recipe.stderr.replace("│", " ").split())
        assert "drawing batches" not in missing.stderr + recipe.stderr
    (folder / "other").write_text("mine\n")
    result = run("sensitivity", *RUN, "--log", "other")
    assert result.exit_code == 1
    assert 'QR332 "other" is not a log of pieces: line 1:' in result.stderr
    assert (folder / "other").read_text() == "mine\n"
    assert run("sensitivity", *RUN, "--log", "new").exit_code == 0
    result = run("sensitivity", *RUN, "--log", "new", "--evaluate", "model.py:accuracy")
    assert "a ranking with functions none instead of evaluate accuracy" in result.stderr
    result = run("sensitivity", *RUN, "--log", "new", "--method", "estimate")
    assert result.exit_code == 2
    assert "--log needs --method exact" in result.stderr


def test_a_scheduler_that_does_not_answer_is_an_error(folder, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("qrecipe.cli.pool._SECONDS", 1)
    result = run("sensitivity", *RUN, "--pool", "dask:tcp://127.0.0.1:1")
    assert result.exit_code == 1
    assert "QR428 no Dask scheduler answers at tcp://127.0.0.1:1" in result.stderr


@pytest.mark.parametrize("command", ["sensitivity", "compare"])
def test_a_command_measures_on_the_workers_of_a_dask_scheduler(folder, command):
    distributed = pytest.importorskip("distributed")
    alone = run(command, *RUN, "--json", "--threads", "1")
    with distributed.LocalCluster(
        n_workers=1, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=None
    ) as cluster:
        pool = f"dask:{cluster.scheduler_address}"
        together = run(command, *RUN, "--json", "--pool", pool)
    assert without_times(together) == without_times(alone)


def test_dask_that_is_not_installed_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = run("sensitivity", *RUN, "--pool", "dask:tcp://127.0.0.1:1")
    assert result.exit_code == 2
    assert "QR602 --pool dask:ADDRESS needs Dask: pip install 'qrecipe[pool]'" in result.stderr


PLUGIN = """
import qrecipe
from torch.ao.quantization import MinMaxObserver

@qrecipe.register_observer("plain")
class Plain(MinMaxObserver):
    pass
"""

HANDLE = """

class Handle:
    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("of this process")

def handled():
    model = bare()
    model.handle = Handle()
    return model
"""


@pytest.mark.slow
def test_processes_find_plugins_and_make_models_that_cannot_be_pickled(folder):
    (folder / "plugin.py").write_text(PLUGIN)
    with (folder / "model.py").open("a") as file:
        file.write(HANDLE)
    (folder / "plain.toml").write_text(
        'format = 1\nextends = "builtin:x86-static"\n'
        '[tensor.activation]\nobserver = "plain"\nreduce_range = true\n'
    )
    told = ("--model", "model.py:handled", "--data", "model.py:batches", "--plugin", "plugin.py")
    words = [sys.executable, "-m", "qrecipe", "sensitivity", "plain.toml", *told, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    alone, together = (
        subprocess.run([*words, *more], capture_output=True, text=True, env=env, timeout=300)
        for more in (("--threads", "1"), ("--pool", "processes:1"))
    )
    assert together.returncode == alone.returncode == 0, together.stderr
    assert json.loads(together.stdout) == json.loads(alone.stdout)
    assert "drawing batches" in together.stderr
