"""The blocks of README.md and of the documentation are tests: see tests/support/pages.py.

With pytest-xdist the process that hands out the tests loads this file too, so that nothing here
imports torch.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest
from pages import blocks, close_session, open_session
from sybil import Sybil

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, here and in every process that a test starts

SLOW_PAGES = {
    "bench.md",
    "compare.md",
    "drift.md",
    "export.md",
    "fastest.md",
    "few-batches.md",
    "gallery.md",
    "lightning.md",
    "pool.md",
    "profile.md",
    "ranks.md",
    "reports.md",
    "security.md",
    "sensitivity.md",
    "shards.md",
    "story.md",
    "testing.md",
    "training.md",
    "transforms.md",
    "tune.md",
}

_FORMER = sys.dont_write_bytecode
sys.dont_write_bytecode = False
gc.disable()

pytest_collect_file = Sybil(
    parsers=[blocks],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/*/*.md"],
    setup=open_session,
    teardown=close_session,
).pytest()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Until its end, what is imported is compiled once, for the next run and for other processes.

    Modules that a test writes are not: within a second, Python may take the old one for the new.
    Nor is there garbage to look for, among what stays.
    """
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = _FORMER
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_PAGES:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    _settle()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[object]:
    """Between files, once what the fixtures of a file held is gone."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        _settle()
    return result


def _settle() -> None:
    """What is there by now stays until the end: no garbage collection has to look at it again.

    Else full collections take a twentieth of the time of the tests: modules that tests import grow
    the heap, and traced graphs fill it.
    """
    gc.collect()
    gc.freeze()
