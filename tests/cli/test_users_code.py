"""The functions of ``--model`` and ``--data``: how they are named, and what their errors become."""

from __future__ import annotations

import sys

import pytest
from command_line import STATIC, run


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.py", "FILE.py:NAME|path/to/file.py:function"),
        ("model.py:", "path/to/file.py:function"),
        ("modell.py:factory", 'did you mean "model.py"?'),
        ("model.py:facttory", 'did you mean "factory"?'),
        ("modell:factory", 'there is no module "modell"'),
        ("model.py:instance", "name a function that returns it"),
    ],
)
def test_wrong_name_of_a_model_is_a_usage_error(folder, name, text):
    result = run("plan", STATIC, "--model", name)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert any(part in said for part in text.split("|")), said


def test_error_of_the_factory_shows_the_users_line(folder):
    result = run("plan", STATIC, "--model", "model.py:broken")
    assert result.exit_code == 1
    assert "model.py:40:5: QR601 broken() failed: KeyError: 'missing'" in result.stderr
    assert '   40 |     return weights["missing"]' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def factory(:\n", "faulty.py:1:1: QR601 loading faulty.py failed: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "faulty.py:2:1: QR601 loading faulty.py failed: SystemExit"),
        ("\nfrom . import x\n", "faulty.py:2:1: QR601 loading faulty.py failed: ImportError"),
        (
            "import torch\n\ndef factory():\n    return torch.ones(2) @ torch.ones(3)\n",
            "faulty.py:4:5: QR601 factory() failed: RuntimeError",
        ),
    ],
)
def test_faulty_file_of_the_user_is_no_traceback(folder, source, message):
    (folder / "faulty.py").write_text(source)
    result = run("plan", STATIC, "--model", "faulty.py:factory")
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_file_of_a_package_is_told_how_it_is_named(folder):
    (folder / "faulty.py").write_text("from . import x\n")
    result = run("plan", STATIC, "--model", "faulty.py:factory")
    assert "| ^^^^^^^^^^^^^^^ name a file of a package as its module" in result.stderr


def test_factory_that_gives_no_model_says_so(folder):
    result = run("plan", STATIC, "--model", "model.py:number")
    assert result.exit_code == 1
    assert "QR601 model.py:number returns a int, not a model" in result.stderr


def test_search_path_is_restored_and_the_file_runs_once(folder):
    before = list(sys.path)
    name = "model.py:factory"
    result = run("quantize", STATIC, "--model", name, "--data", f"./{name[:8]}:batches")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("loading") == 1
    assert sys.path == before


def test_files_of_one_name_in_two_folders_are_two_modules(folder):
    other = folder / "other"
    other.mkdir()
    (other / "model.py").write_text(
        "import torch\ndef batches():\n    return 12 * [torch.ones(2, 3, 8, 8)]\n"
    )
    data = "other/model.py:batches"
    result = run("quantize", STATIC, "--model", "model.py:factory", "--data", data)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("status", [0, 6])
def test_a_loader_that_ends_the_process_is_said_to_do_so(folder, status):
    (folder / "leaving.py").write_text(
        "import sys\nimport torch\ndef batches():\n"
        f"    yield torch.ones(2, 3, 8, 8)\n    sys.exit({status})\n"
    )
    name = "leaving.py:batches"
    result = run("quantize", STATIC, "--model", "model.py:factory", "--data", name)
    assert result.exit_code == 1
    assert f"QR601 your code ends the process in batches: SystemExit: {status}" in result.stderr
    assert "leaving.py:5" in result.stderr
