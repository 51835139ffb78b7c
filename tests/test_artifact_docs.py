"""The examples of docs/artifacts.md and docs/export.md work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import qrecipe
from qrecipe.errors import CODES

DOCS = Path(__file__).parent.parent / "docs"


def examples(page):
    """The Python of a page, in one text."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.mark.slow
def test_the_example_of_saving_and_loading_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS.parent)
    scope: dict = {}
    exec(examples("artifacts.md"), scope)
    batch = next(iter(scope["calibration"]()))
    assert torch.equal(scope["loaded"](batch), scope["converted"](batch))


@pytest.mark.slow
def test_the_example_of_exporting_works(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS.parent)
    scope: dict = {}
    exec(examples("export.md"), scope)
    converted = scope["compiled"].convert(scope["prepared"])
    expected = converted(*scope["example_inputs"])
    assert qrecipe.sqnr.sqnr_db(expected, torch.from_numpy(scope["output"])) > 30


def test_every_code_about_stored_models_is_explained():
    text = (DOCS / "artifacts.md").read_text(encoding="utf-8")
    explained = {"QR501", "QR511", "QR512"} | set(re.findall(r"QR5\d\d", text))
    assert {code for code in CODES if code.startswith("QR5")} == explained
