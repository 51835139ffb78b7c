"""One seed for every test; what needs VNNI is skipped where the CPU has none."""

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
