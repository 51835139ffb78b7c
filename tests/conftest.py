"""One thread and one seed for every test."""

from __future__ import annotations

import pytest
import torch

from qrecipe.cpu import has_vnni

torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("vnni") and not has_vnni():
        pytest.skip("this CPU has no VNNI")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
