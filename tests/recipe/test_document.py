"""Hostile files: each one is a finding, none an accident."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from qrecipe.errors.findings import RecipeError, RecipeReferenceError, RecipeSyntaxError
from qrecipe.recipe.recipe import load_recipe, parse_recipe
from qrecipe.recipe.toml.document import MAX_BYTES


def only_finding(source, error=RecipeError):
    with pytest.raises(error) as caught:
        load_recipe(source)
    (finding,) = caught.value.findings
    return finding


def test_a_missing_file_is_a_reference_error(tmp_path):
    finding = only_finding(tmp_path / "none.toml", RecipeReferenceError)
    assert finding.code == "QR001"
    assert "there is no file" in finding.message


def test_a_missing_recipe_that_is_shipped_is_suggested(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert only_finding("x86-static").hint == 'did you mean "builtin:x86-static"?'


def test_a_directory_is_not_read(tmp_path):
    finding = only_finding(tmp_path)
    assert (finding.code, "a directory" in finding.message) == ("QR001", True)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs POSIX devices")
def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "link.toml").symlink_to("/dev/zero")
    for source in ("/dev/zero", tmp_path / "pipe.toml", tmp_path / "link.toml"):
        finding = only_finding(source)
        assert (finding.code, "not a regular file" in finding.message) == ("QR001", True)


@pytest.mark.parametrize("source", ["a\0b.toml", "x" * 10_000, ""])
def test_an_impossible_path_is_a_finding(source):
    assert only_finding(source).code == "QR001"


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.toml"
    with path.open("wb") as stream:
        stream.truncate(10 * MAX_BYTES)
    assert only_finding(path, RecipeSyntaxError).code == "QR002"
    with pytest.raises(RecipeSyntaxError, match="QR002"):
        parse_recipe("#" * (MAX_BYTES + 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"format = 1\nname = '\xff'\n", "not UTF-8: byte 0xff"),
        (b"\x7fELF\0\0\0", "NUL byte"),
        ("format = 1".encode("utf-16"), "UTF-16"),
        (b"\xef\xbb\xbfformat = 1\n", "byte order mark"),
    ],
)
def test_what_is_not_utf8_text_is_refused(tmp_path, content, message):
    path = tmp_path / "odd.toml"
    path.write_bytes(content)
    finding = only_finding(path, RecipeSyntaxError)
    assert finding.code == "QR003"
    assert message in finding.message


@pytest.mark.parametrize("place", ["name = '{}'\n", "# {}\n", "[rules.module_name]\n'{}' = 3\n"])
def test_half_a_character_in_a_text_is_refused(place):
    with pytest.raises(RecipeSyntaxError) as caught:
        parse_recipe("format = 1\n" + place.format("a\ud800"))
    (finding,) = caught.value.findings
    assert (finding.code, "U+D800" in finding.message) == ("QR003", True)
    assert finding.location.line == (2 if "rules" not in place else 3)
    str(caught.value).encode("utf-8")


def test_a_path_that_is_no_text_is_still_shown(tmp_path):
    finding = only_finding(str(tmp_path / "a\udc80.toml"))
    assert finding.code == "QR001"
    str(finding).encode("utf-8")
    with pytest.raises(RecipeError) as caught:
        parse_recipe("x = 1", str(tmp_path / "a\udc80.toml"))
    str(caught.value).encode("utf-8")


def test_an_undecodable_byte_is_shown_with_its_line(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes("format = 1\nname = 'caf\xe9'\n".encode("latin-1"))
    assert only_finding(path).location.line == 2


def test_an_empty_file_lacks_what_is_required(tmp_path):
    path = tmp_path / "empty.toml"
    path.touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [finding.code for finding in caught.value.findings] == ["QR103"] * 3
    assert {finding.location.line for finding in caught.value.findings} == {1}


def test_a_syntax_error_is_shown_with_line_and_caret():
    with pytest.raises(RecipeSyntaxError) as caught:
        parse_recipe('format = 1\nbackend = x86\n[rules]\nglobal = "float"\n', "dir/odd.toml")
    assert str(caught.value) == (
        "dir/odd.toml:2:11: QR004 invalid TOML: this is not a value\n"
        "    2 | backend = x86\n"
        '      |           ^ strings must be quoted, "like this"'
    )


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 300 + "]" * 300,
        "a = " + "[" * 100_000,
        "a = " + "{a=" * 50_000,
        ".".join(["a"] * 5_000) + " = 1",
        "[" + ".".join(["a"] * 101) + "]",
    ],
)
def test_deep_nesting_is_a_finding(text):
    with pytest.raises(RecipeSyntaxError, match="QR005"):
        parse_recipe(text)


@pytest.mark.parametrize("number", ["9" * 100_000, "0x" + "f" * 100_000, "9223372036854775808"])
def test_a_number_without_end_is_a_finding(number):
    with pytest.raises(RecipeError, match=r"QR004|QR102") as caught:
        parse_recipe(f'[tensor.a]\nobserver = {{ name = "minmax", bins = {number} }}')
    assert len(str(caught.value)) < 2_000
    assert 2 in {finding.location.line for finding in caught.value.findings}


@pytest.mark.parametrize(
    "lines",
    [
        (f"unknown{i} = {i}" for i in range(40_000)),
        (f"[tensor.t{i}]\nobserver = 'minmaxx'" for i in range(15_000)),
        (f"[qconfig.q{i}]\nweight = 'nearly{i}'" for i in range(15_000)),
        ("[rules.module_name]", *(f"'{'*a' * 200}{i}' = 'q{i}'" for i in range(2_000))),
        ("[rules.function]", *(f"'torch.matmul{i}' = 'float'" for i in range(15_000))),
    ],
)
def test_a_megabyte_of_mistakes_takes_seconds_and_shows_no_more_than_can_be_read(lines):
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse_recipe("\n".join(lines)[:MAX_BYTES])
    assert time.process_time() - started < 20
    assert len(caught.value.findings) <= 300


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys, qrecipe.recipe.recipe\n"
        "qrecipe.recipe.recipe.load_recipe('builtin:x86-static')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
