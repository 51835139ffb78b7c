"""What the tests of the search share."""

from __future__ import annotations

import pytest
from tuning import in_float_time

from qrecipe.authoring.tune.trials import ModelBench


def alike(bench, levers):
    """Each site takes as long as any other in float, and no time in int8."""
    return in_float_time(**dict.fromkeys(bench.members, 1.0))


@pytest.fixture
def only_sites(monkeypatch):
    """These tests are of the search for sites; levers and int8 times have tests of their own.

    Sites of nets this small take next to nothing, and whether int8 is faster is noise.
    """
    monkeypatch.setattr("qrecipe.authoring.tune.tune.levers_of", lambda *args: ())
    monkeypatch.setattr(ModelBench, "_priced", alike)
