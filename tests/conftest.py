"""One seed for every test, VNNI where it is needed, and pages without drawings where asked for."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item):
    if item.get_closest_marker("vnni"):
        from qrecipe.planning.cpu import has_vnni

        if not has_vnni():
            pytest.skip("this CPU has no VNNI")


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    # manual_seed queues each call, with its stack, for devices that are not there
    torch.default_generator.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of the words on pages: drawing takes longer than all else."""
    monkeypatch.setattr("qrecipe.measure.pages.charts._svg", lambda figure: b"<svg/>")
