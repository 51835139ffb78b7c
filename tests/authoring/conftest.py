"""What the tests of the search share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_levers(monkeypatch):
    """These tests are of the search for sites; the levers have tests of their own."""
    monkeypatch.setattr("qrecipe.authoring.tune.tune.levers_of", lambda *args: ())
