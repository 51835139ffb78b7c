"""Saving and loading take one weight at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import ROOT

GOALS = {"save": 0.3, "load": 0.5}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("recipe", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_saving_and_loading_take_less_memory_than_the_float_model(recipe):
    script = ROOT / "benchmarks" / "memory.py"
    options = ["--megabytes", "64", "--recipes", recipe, "--steps", *GOALS]
    done = subprocess.run(
        [sys.executable, script, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[3] for row in rows] == list(GOALS)
    for row in rows:
        assert float(row[4]) <= GOALS[row[3]], done.stdout
