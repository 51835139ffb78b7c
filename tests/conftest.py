"""What is drawn is seeded, VNNI is there where needed, and pages are not drawn where asked."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
from hypothesis import settings

settings.register_profile("few", max_examples=30, deadline=None)
settings.register_profile("many", max_examples=400, deadline=None)  # --hypothesis-profile many
settings.load_profile("few")


def pytest_runtest_setup(item):
    if item.get_closest_marker("vnni"):
        from qrecipe.planning.cpu import has_vnni

        if not has_vnni():
            pytest.skip("this CPU has no VNNI")


@pytest.fixture(autouse=True)
def _seeded():
    _seed()


def pytest_collectstart(collector):
    """What a module draws does not depend on the modules before it."""
    if isinstance(collector, pytest.Module):
        _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """Nor what a fixture for many tests draws on the tests before it."""
    if fixturedef.scope != "function":
        _seed()


def _seed():
    if find_spec("torch") is None:  # those that check recipes run without torch too
        return
    import torch

    # manual_seed queues each call, with its stack, for devices that are not there
    torch.default_generator.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of the words on pages: drawing takes longer than all else."""
    monkeypatch.setattr("qrecipe.measure.pages.charts._svg", lambda figure: b"<svg/>")


@pytest.fixture(scope="session")
def onnx_listed_once():
    """torch lists all operators of ONNX for each export, which takes longer than the rest."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib))
        )
        yield
