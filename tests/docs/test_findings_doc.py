"""docs/findings.md and the pages below it explain every code, once and with an example."""

from __future__ import annotations

import re

import pytest
from markdown.extensions.toc import slugify
from pages import commands
from places import ROOT

from qrecipe.errors.findings import CODES

DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "findings").glob("*.md"))
_BLOCK = re.compile(r"^```(console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections():
    """Page, code, title and text of every section."""
    for page in PAGES:
        parts = re.split(r"^## (.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True):
            code, _, title = heading.partition(" ")
            yield page.name, code, title, text


SECTIONS = list(sections())


def outputs(text):
    """What the blocks of a section show as printed."""
    for language, block in _BLOCK.findall(text):
        if language == "text":
            yield block
        else:
            yield from (shown for _, shown in commands(block))


def test_every_code_has_one_section_under_its_own_title():
    found = sorted((code, title) for _, code, title, _ in SECTIONS)
    assert found == sorted((code, meaning.title) for code, meaning in CODES.items())


def test_the_sections_of_a_page_are_in_order():
    for page in PAGES:
        codes = [code for name, code, _, _ in SECTIONS if name == page.name]
        assert codes == sorted(codes)


def test_the_index_has_every_code_in_order_with_its_class_and_its_section():
    page_of = {code: name for name, code, _, _ in SECTIONS}
    rows = re.findall(r"^\| \[.*$", (DOCS / "findings.md").read_text("utf-8"), re.MULTILINE)
    assert rows == [
        f"| [{code}](findings/{page_of[code]}#{slugify(f'{code} {meaning.title}', '-')}) "
        f"| {meaning.title} "
        f"| {'warning' if meaning.error is None else f'`{meaning.error.__name__}`'} |"
        for code, meaning in sorted(CODES.items())
    ]


@pytest.mark.parametrize(("page", "code", "text"), [(p, c, t) for p, c, _, t in SECTIONS])
def test_a_section_names_its_class_and_shows_its_finding(page, code, text):
    error = CODES[code].error
    if error is not None:
        assert re.match(rf"\n`{error.__name__}`\W", text)
    elif page != "warnings.md":
        assert text.startswith("\nWarning.")
    assert any(code in shown for shown in outputs(text))
