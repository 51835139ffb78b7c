"""Texts that are no TOML: the caret stands where the mistake is, and the hint mends it."""

from __future__ import annotations

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from recipe_texts import FULL, findings_of, marked

from qrecipe.errors.findings import RecipeError
from qrecipe.recipe.recipe import parse_recipe

MISTAKES = [
    # text, line, text under the caret, part of message or hint
    ("backend = x86", 1, "x", "must be quoted"),
    ("a = True", 1, "T", "write true"),
    ("a =", 1, "", "a value is missing"),
    ("a = [1, , 2]", 1, ",", "a value is missing"),
    ('backend "x86"', 1, '"', "write KEY = VALUE"),
    ("backend", 1, "", "write KEY = VALUE"),
    ("naïve = 1", 1, "ï", "must be quoted"),
    ("format = 1 backend = 2", 1, "b", "a line of its own"),
    ("format = 01", 1, "1", "leading zeros are not allowed"),
    ('name = "x\nformat = 1', 1, "", "the string is not closed"),
    ("format = 1\nname = 'x\n\nbackend = 1\n", 2, "'x", "end it with '"),
    ('format = 1\nname = """x\n\nbackend = 1\n', 2, '"""x', 'end it with """'),
    ('name = "a\x01b"', 1, "�", r"\u0001"),
    ('name = "C:\\qrecipe"', 1, "\\q", "'single quotes'"),
    ("a = [1, 2\nb = 3", 2, "b", "the array is not closed"),
    ("a = { b = 1\nc = 2", 2, "c", "the inline table is not closed"),
    ("[rules\nglobal = 1", 1, "", "the header is not closed"),
    ("= 1", 1, "=", "KEY = VALUE"),
    ("a = 1\r\nb = 2 3", 2, "3", "a line of its own"),
]


@pytest.mark.parametrize(("text", "line", "under_caret", "says"), MISTAKES)
def test_what_is_no_toml_is_shown_where_it_is_and_how_to_mend_it(text, line, under_caret, says):
    (finding,) = findings_of(text)
    assert finding.code == "QR004"
    assert (finding.location.line, marked(finding)) == (line, under_caret)
    assert says in f"{finding.message} {finding.hint}"


TWICE = [
    # text, key under the caret, its line, line where it was set first
    ("format = 1\nname = 'x'\nformat = 1\n", "format", 3, 1),
    ('name = """\n\n"""\nname = """\n"""\n', "name", 4, 1),
    ("[tensor.a]\n[tensor]\n[tensor.a]\n", "a", 3, 1),
    ("[rules]\nglobal = 1\n[lint]\n[rules]\nglobal = 2\n", "rules", 4, 1),
    ("a.b = 1\na = 2\n", "a", 2, 1),
    ("a = 1\na.b = 2\n", "a", 2, 1),
    ("a = 1\n[a]\n", "a", 2, 1),
    ("x = { a = 1,\n b = 2, a = { a = 1 } }\n", "a", 2, 1),
    ("\"a b\" = 1\n'a b' = 2\n", "'a b'", 2, 1),
    ("[a.b]\n[a]\nb.c = 1\n", "b", 3, 1),
    ("a = { b = 1 }\na.c = 2\n", "a", 2, 1),
]


@pytest.mark.parametrize(("text", "key", "line", "first"), TWICE)
def test_a_key_that_is_set_twice_is_shown_with_its_first_place(text, key, line, first):
    (finding,) = findings_of(text)
    ((_, before),) = finding.related
    assert (marked(finding), finding.location.line, before.line) == (key, line, first)
    assert finding.message.startswith(f"invalid TOML: {key} is ")


def test_a_number_without_end_is_shown_on_its_line():
    (finding,) = findings_of(f"format = 1\nname = '{'9' * 600}'\nb = 3\nc = -{'9' * 5_000}\n")
    assert str(finding.location) == "recipes/cnn.toml:4:5"
    assert len(str(finding)) < 500


@given(st.data())
def test_a_text_that_was_cut_or_mixed_up_is_never_an_accident(data):
    start, end, at = (data.draw(st.integers(0, len(FULL))) for _ in range(3))
    piece = data.draw(st.sampled_from(["", '"', "'", '"""', "[", "{", "=", "\n", "1", "a = 1\n"]))
    text = FULL[:at] + piece + FULL[start:end] + FULL[at:]
    try:
        tomli.loads(text)
        is_toml = True
    except tomli.TOMLDecodeError:
        is_toml = False
    findings = ()
    try:
        parse_recipe(text)
    except RecipeError as error:
        findings = error.findings
    assert all(finding.location is not None for finding in findings)
    assert any(finding.code == "QR004" for finding in findings) is not is_toml
