"""What the tests of the search share."""

from __future__ import annotations

import pytest
from tuning import alike

from qrecipe.authoring.tune.trials import ModelBench


@pytest.fixture
def only_sites(monkeypatch):
    """These tests are of the search for sites; levers and int8 times have tests of their own."""
    monkeypatch.setattr("qrecipe.authoring.tune.tune.levers_of", lambda *args: ())
    monkeypatch.setattr(ModelBench, "_priced", alike)
