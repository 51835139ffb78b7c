"""Installed distributions, made up on disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qrecipe.observers import loading
from qrecipe.registry import table as registered

OBSERVER = """
import qrecipe
from torch.ao.quantization.observer import MinMaxObserver

@qrecipe.register_observer("{name}")
class {cls}(MinMaxObserver):
    pass
"""


def observer_module(name: str, cls: str = "Mine") -> str:
    """The source of a module that registers a sound observer."""
    return OBSERVER.format(name=name, cls=cls)


def install(
    site: Path,
    name: str,
    points: Mapping[str, str],
    version: str = "1.0",
    group: str = "qrecipe.plugins",
    **modules: str,
) -> None:
    """A distribution with its entry points, and modules by name with their source."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{point} = {value}\n" for point, value in points.items()]
    (info / "entry_points.txt").write_text("".join([f"[{group}]\n", *lines]))
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed distributions; what they register is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(loading, "_failed", {})
    before, modules = registered.snapshot(), set(sys.modules)
    yield folder
    registered.restore(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
