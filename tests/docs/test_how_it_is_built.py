"""The drawing of the pipeline and the list of layers are those of the code."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import tomli
from places import ROOT

from qrecipe.errors.findings import CODES

PACKAGE = ROOT / "qrecipe"
PAGE = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
PICTURE = ElementTree.parse(ROOT / "docs" / "pipeline.svg").getroot()
SVG = "{http://www.w3.org/2000/svg}"
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}
CODE = re.compile(r"QR\d{3}")


def texts(element, kind):
    """The texts of a class of the drawing, joined."""
    return " ".join(
        str(text.text)
        for text in element.iter(f"{SVG}text")
        if kind in text.get("class", "").split()
    )


STEPS = {
    texts(group, "label"): group
    for group in PICTURE.iter(f"{SVG}g")
    if group.get("class") == "stage"
}


def sources(module):
    """The files of a module, or of all modules of a package."""
    path = PACKAGE.joinpath(*module.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def codes(text):
    """The codes that a text names, those of ranges among them."""
    found = set()
    for first, last in re.findall(r"(QR\d{3})(?:–(QR\d{3}))?", text):
        found |= {code for code in CODES if first <= code <= (last or first)}
        assert {first, last or first} <= CODES.keys()
    return found


@pytest.mark.parametrize("step", STEPS)
def test_every_module_of_the_drawing_exists(step):
    named = texts(STEPS[step], "modules").split()
    assert [name for name in named if not all(path.exists() for path in sources(name))] == []


@pytest.mark.parametrize("step", STEPS)
def test_every_code_of_a_step_arises_in_one_of_its_modules(step):
    files = [path for name in texts(STEPS[step], "modules").split() for path in sources(name)]
    written = {code for path in files for code in CODE.findall(path.read_text(encoding="utf-8"))}
    assert codes(texts(STEPS[step], "codes")) - written == set()


def test_every_code_stands_in_the_drawing():
    drawn = codes(" ".join(PICTURE.itertext()))
    assert CODES.keys() - drawn == set()
    errors = {code for code, found in CODES.items() if found.error is not None}
    assert errors == codes(texts(PICTURE, "codes"))


def test_what_is_drawn_without_torch_is_kept_from_torch():
    free = {name.removeprefix("qrecipe.") for name in CONTRACTS["torch-free"]["source_modules"]}
    drawn = set(texts(PICTURE, "free").split())
    assert {"recipe.toml", "recipe.schema", "registry", "rules"} <= drawn
    assert {name for name in drawn if not {name, name.partition(".")[0]} & free} == set()


def test_the_drawing_is_text_in_fonts_of_the_reader_and_follows_light_and_dark():
    style = next(PICTURE.iter(f"{SVG}style")).text
    assert "prefers-color-scheme: dark" in style
    assert "@font-face" not in style
    assert "url(" not in style
    assert "](pipeline.svg)" in PAGE


def test_the_page_lists_the_layers_of_the_code_from_top_to_bottom():
    layers = [set(re.findall(r"\w+", line)) for line in CONTRACTS["layers"]["layers"]]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .+ \|$", PAGE, re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in rows] == layers
