"""The program as a whole: what it needs, what it lists, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import typer
from command_line import STATIC, run
from places import ROOT

from qrecipe.cli.app import app
from qrecipe.cli.output import out


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_misspelt_observer_is_shown_with_its_line_a_caret_and_the_right_name(folder):
    done = python("-m", "qrecipe", "check", str(folder / "bad.toml"))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f'{folder}/bad.toml:9:12: QR104 unknown observer "minmaxx"'
    assert lines[1] == '    9 | observer = "minmaxx"'
    assert lines[2] == '      |            ^^^^^^^^^ did you mean "minmax"?'
    assert lines[-1] == "1 recipe checked: 1 error"


TORCH_FREE = (["check", STATIC], ["show", STATIC], ["diff", STATIC, STATIC], ["schema"])


def test_commands_without_a_model_import_no_torch():
    code = (
        "import sys\n"
        "from qrecipe.__main__ import main\n"
        f"for arguments in {TORCH_FREE}:\n"
        "    sys.argv = ['qrecipe', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 0, error.code\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'torch'))\n"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_misspelt_choice_is_told_the_nearest_one():
    told = set()
    for command in typer.main.get_command(app).commands:
        for option, words in re.findall(
            r"(--[\w-]+) +[<\[](\w+(?:\|\w+)+)[>\]]", run(command, "-h").output
        ):
            named = words.split("|")
            result = run(command, option, f"{named[-1]}x")
            assert result.exit_code == 2
            listed = ", ".join(map(repr, named))
            near = f"'{named[-1]}x' is not one of {listed}. Did you mean '{named[-1]}'?"
            assert f"Error: Invalid value for '{option}': {near}" in result.output
            told.add(option)
    assert told == {"--executor", "--target-cpu", "--method", "--to", "--runtime"}
    assert "is not one of" in (far := run("plan", STATIC, "--executor", "9").output)
    assert "Did you mean" not in far


def test_missing_extra_is_named_without_a_traceback():
    code = "import sys; sys.modules['typer'] = None; import qrecipe.__main__ as m; m.main()"
    done = python("-c", code)
    assert done.returncode == 2
    assert "needs the extra cli: pip install 'qrecipe[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_separators_of_lines_are_not_printed(capsys):
    out("one\u2028two\u2029three")
    assert capsys.readouterr().out == "one\ufffdtwo\ufffdthree\n"


def test_text_that_a_pipe_cannot_encode_is_escaped():
    command = ("-m", "qrecipe", "diff", STATIC, "builtin:arm-static")  # without torch
    done = python(*command, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 1, done.stderr
    assert "\\u2500" in done.stdout


def test_missing_torch_is_a_usage_error():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from qrecipe.__main__ import main\n"
        "for name in ('plan', 'compare', 'sensitivity', 'drift'):\n"
        "    data = () if name == 'plan' else ('--data', 'model.py:batches')\n"
        f"    sys.argv = ['qrecipe', name, '{STATIC}', '--model', 'model.py:factory', *data]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as error:\n"
        "        print(error.code)\n"
    )
    done = python("-c", code)
    assert done.stdout.split() == ["2"] * 4, done.stderr
    assert done.stderr.count("QR602 this command needs torch") == 4


def test_list_names_recipes_observers_and_backends():
    document = json.loads(run("list", "--json").stdout)
    assert STATIC in [line["reference"] for line in document["recipes"]]
    observers = {line["name"]: line for line in document["observers"]}
    assert observers["histogram"]["arguments"] == ["bins"]
    backends = {line["name"]: line["available"] for line in document["backends"]}
    assert backends["tensorrt"] is False
    assert any(backends.values())
    text = run("list").stdout
    assert all(name in text for name in (STATIC, "histogram", "fused_moving_average", "tensorrt"))


def test_list_without_torch_says_what_it_cannot_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    document = json.loads(run("list", "--json").stdout)
    assert {line["available"] for line in document["backends"]} == {None}


@pytest.mark.parametrize(
    "command", ["check", "show", "plan", "explain", "quantize", "list", "lock", "diff", "schema"]
)
def test_help_of_every_command_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"qrecipe {command} " in result.stdout.partition("Examples:")[2] + " "
    summary = next(line for line in run("--help").stdout.splitlines() if f"  {command} " in line)
    assert summary.endswith(".")
    assert not summary.endswith("...")


@pytest.mark.parametrize(
    "arguments", [("check",), ("chek", "x"), ("plan", STATIC), ("show", "--x")]
)
def test_wrong_usage_ends_with_status_two(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: qrecipe" in result.stderr


def test_version_is_printed():
    import qrecipe

    assert run("--version").stdout == f"qrecipe {qrecipe.__version__}\n"
