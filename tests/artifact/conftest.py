"""A sound file, and a copy of it to be spoilt."""

from __future__ import annotations

import functools

import pytest
from artifacts import stored


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A sound file of the net ``mlp``."""
    return stored(tmp_path_factory.mktemp("good"), "mlp")


@pytest.fixture
def file(good, tmp_path):
    """A copy of it, to be spoilt."""
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(good.read_bytes())
    return path


@pytest.fixture(scope="module")
def operators_listed_once():
    """torch lists all operators of ONNX for each export, which takes longer than the rest."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    listed = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", listed)
        yield
