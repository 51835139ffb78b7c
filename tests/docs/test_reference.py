"""What documentation is made from the program is what the program says today."""

from __future__ import annotations

import re
import sys

import pytest
from places import ROOT

import qrecipe
from qrecipe.recipe.json_schema import recipe_schema

DOCS = ROOT / "docs"


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import reference

    yield reference
    sys.modules.pop("reference", None)


def test_the_tables_of_the_format_are_made_from_the_schema(reference):
    text = (DOCS / "format.md").read_text(encoding="utf-8")
    assert reference.with_tables(text) == text, "run python tools/reference.py"


def test_a_page_without_its_markers_is_refused(reference):
    with pytest.raises(ValueError, match="0 pairs of markers for recipe"):
        reference.with_tables("# The recipe format\n")


def test_every_key_of_the_format_has_a_description_there(reference):
    schema = recipe_schema()
    for definition in [
        schema,
        *(schema["definitions"][name] for name in reference.TABLES.values() if name),
    ]:
        for key, value in definition["properties"].items():
            assert "description" in value or "$ref" in value, key


def test_the_page_of_commands_shows_every_command(reference):
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert reference.commands_page() == text, "run python tools/reference.py"
    assert len(re.findall(r"^\$ qrecipe \w+ --help$", text, re.MULTILINE)) > 10


def test_the_page_of_the_api_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: qrecipe\.(\S+)$", text, re.MULTILINE)
    testing = [name for name in named if name.startswith("testing")]
    assert sorted(set(named) - set(testing)) == sorted(set(qrecipe.__all__) - {"__version__"})
    assert testing
