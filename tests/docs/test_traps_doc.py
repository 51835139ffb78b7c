"""docs/traps.md holds every row, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT, functions_of

LINES = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8").splitlines()
NUMBERS = range(1, 79)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


ROWS = {int(cells(line)[0]): line for line in LINES if re.match(r"\| \d+ \|", line)}


def test_every_row_is_there_once_and_says_what_both_do():
    numbers = [int(cells(line)[0]) for line in LINES if re.match(r"\| \d+ \|", line)]
    assert sorted(numbers) == list(NUMBERS)
    for line in ROWS.values():
        assert len(cells(line)) == 4
        assert all(cells(line))


@pytest.mark.parametrize("number", NUMBERS)
def test_every_row_names_tests_that_exist(number):
    named = TEST.findall(cells(ROWS[number])[3])
    assert named
    for path, name in named:
        assert name in functions_of(path), f"{path} has no {name}"


def test_no_test_of_a_trap_is_missing_from_the_list():
    named = {name for line in LINES for _, name in TEST.findall(line)}
    for path in sorted((ROOT / "tests").rglob("test_traps_*.py")):
        if path.name != Path(__file__).name:
            tests = {name for name in functions_of(path) if name.startswith("test_")}
            assert tests <= named
