"""How pieces are cut and computed in tests of workers."""

from __future__ import annotations

import pytest
import torch

from qrecipe.measure.sensitivity import steps


@pytest.fixture
def many_pieces_in_one_thread(monkeypatch):
    """Pieces of two sites at most, and one thread."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(steps, "_AT_ONCE", 2)
    yield
    torch.set_num_threads(former)
