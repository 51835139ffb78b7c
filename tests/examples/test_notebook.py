"""The notebook: what is stored in it is what its cells give."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from places import ROOT

NOTEBOOK = ROOT / "examples" / "digits" / "from_float_to_int8.ipynb"
TABLE = """\
class Table:
    def __repr__(self):
        return "a table"
    def _repr_html_(self):
        return "<" + "table>"
Table()"""


def notebook(path, *sources):
    """A notebook of these cells, with nothing stored."""
    cells = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": s}
        for s in sources
    ]
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4})
    path.write_text(text, encoding="utf-8")
    return path


def run(path, *options):
    command = [sys.executable, str(ROOT / "tools" / "notebook.py"), str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def stored(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "x = 2\nprint(x, 'words')", "x + 1", TABLE)
    assert run(path, "--write").returncode == 0
    return path


def test_what_cells_print_and_the_value_of_a_last_line_are_stored(stored):
    outputs = [cell["outputs"] for cell in json.loads(stored.read_text())["cells"]]
    assert [one["output_type"] for each in outputs for one in each] == [
        *("stream", "execute_result", "execute_result")
    ]
    assert outputs[0][0]["text"] == ["2 words\n"]
    assert outputs[1][0]["data"] == {"text/plain": ["3"]}
    assert outputs[2][0]["data"]["text/html"] == ["<table>"]
    assert run(stored).returncode == 0


@pytest.mark.parametrize(
    ("stored_text", "other", "status"),
    [("2 words", "7 words", 0), ("2 words", "2 other words", 1), ("<table>", "<p>", 1)],
)
def test_other_words_than_the_stored_ones_fail_and_other_numbers_do_not(
    stored, stored_text, other, status
):
    stored.write_text(stored.read_text().replace(stored_text, other))
    result = run(stored)
    assert result.returncode == status
    assert ("--write" in result.stderr) is (status == 1)


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    result = run(notebook(tmp_path / "n.ipynb", "1 / 0"))
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


def test_the_notebook_shows_its_plan_and_its_ranking_as_tables():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    shown = {
        "".join(cell["source"]).splitlines()[-1]: "".join(output["data"]["text/html"])
        for cell in cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    }
    assert {"plan", "ranking"} <= set(shown)
    assert all("<table" in html and "block1.pointwise" in html for html in shown.values())
