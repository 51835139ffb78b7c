"""The page about stored models explains every code; tests/support/pages.py runs its examples."""

from __future__ import annotations

import re

from places import ROOT

from qrecipe.errors.findings import CODES

PAGE = ROOT / "docs" / "artifacts.md"


def test_every_code_about_stored_models_is_explained():
    text = PAGE.read_text(encoding="utf-8")
    explained = {"QR501", "QR511", "QR512"} | set(re.findall(r"QR5\d\d", text))
    assert {code for code in CODES if code.startswith("QR5")} == explained
