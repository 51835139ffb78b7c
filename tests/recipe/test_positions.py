"""Positions in TOML: every span, read again by itself, gives its key and its value."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from qrecipe.errors.findings import Location
from qrecipe.recipe.toml.positions import MAX_DEPTH, KeyPath, NestingError, Spans

TRICKY = r'''# a comment with [brackets] = "and" {braces}
title = "TOML \u00e9 \x41 \e[0m" # trailing
"quoted.key" = 'C:\path # no comment'
"ключ"."a.b" . 'c d' = 1
"" . "" = 2

dates = [1979-05-27 07:32:00, 1979-05-27, 07:32:00,
    1979-05-27T07:32:00Z, 1979-05-27 07:32:00.5-07:00]
numbers = [ 0xDEAD_beef, 0o17, 0b1, 1e3, -inf, +nan, 1_000.5E-2,]
multi = """
line "quoted" ""two"" \
   joined \""" escaped"""""
literal = """'"""
lines = @@@
raw \ 'one' ''two'' 🎉@@@''
inline = { a.b = [1, { "c d" = "}" }], # a comment }
    e = { }, 'f' = [ ], }
emoji = "🎉🎉" # after two wide characters
"\u0074wice" = "an escape in a key"
true = false
[a."b.c".d]
x = 1
[a]
y = [[1, 2], [ # comment ]
  3,
]]
[[products]]
name = "one"
[products.size]
w = 1
[[products]]
name = "two"
[[products.parts]]
id = 1
[[products.parts]]
id = 2
[products.parts.inner]
deep = "🎉"
[ "spaced" . key ]   # header with blanks
	z = 1
'''.replace("@@@", "'''")


def paths_of(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key), inner
        yield from paths_of(inner, (*path, key))


def assert_spans_read_back(text: str) -> int:
    """Every path of the document has a key span and a value span that mean the same alone."""
    data, spans = tomli.loads(text), Spans(text, "file.toml")
    key_spans: dict[KeyPath, set[tuple[int, int]]] = {}
    paths = list(paths_of(data))
    for path, value in paths:
        key, value_span = spans._node(path).key, spans.value_offsets(path)
        assert_location(spans.key(path), spans.text, key)
        assert_location(spans.value(path), spans.text, value_span)
        assert key not in key_spans.setdefault(path[:-1], set())
        key_spans[path[:-1]].add(key)
        if isinstance(path[-1], str):
            assert tomli.loads(f"{spans.text[slice(*key)]} = 0") == {path[-1]: 0}
            has_value = value_span != key
        else:
            has_value = spans.text[spans.value_offsets(path[:-1])[0]] == "["
        if has_value:
            written = tomli.loads(f"v = {spans.text[slice(*value_span)]}\n")["v"]
            assert repr(written) == repr(value)
        else:
            assert isinstance(value, (dict, list))
    return len(paths)


def assert_location(location: Location, text: str, span: tuple[int, int]) -> None:
    lines = text.split("\n")
    start = sum(len(line) + 1 for line in lines[: location.line - 1]) + location.column - 1
    assert start == span[0]
    assert location.source == lines[location.line - 1]
    on_line = location.source[location.column - 1 : location.end_column - 1]
    assert on_line == text[slice(*span)].split("\n")[0]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_span_of_a_tricky_document_reads_back(newline):
    assert assert_spans_read_back(TRICKY.replace("\n", newline)) > 60


# --- generated documents: every name and value carries a number of its own

_NAMES = ["n{}", "{}", '"q.{}"', "'l #{}'", '"ü🎉 {} \\u00e9\\""', '"\\x41{}"', "-{}_"]
_SCALARS = [
    "{}",
    "0x{:x}f",
    "-{}.25e-3",
    "1_{}",
    '"b{} # \\" ] }} \\\\"',
    "'l{} \\ # ] }}'",
    '"""\nm{} "" \\\n   x \\""" y"""""',
    "'''r{}\n''\n# ]'''''",
    '""" 🎉{}"""',
    "1979-05-27 07:32:00.{:03}",
    "1979-05-27T07:32:00.{:03}Z",
    "07:32:00.{:03}",
    "true",
    "inf",
]
_NOISE = ["", " ", "\t", "\n", " # comment ] } \" '''\n", "\n\n  "]


class _Document:
    """Draws a valid TOML text; a counter keeps names and values apart."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.count = draw, 0

    def one_of(self, options: list[str]) -> str:
        return self.draw(st.sampled_from(options))

    def numbered(self, options: list[str]) -> str:
        self.count += 1
        return self.one_of(options).format(self.count)

    def key(self) -> str:
        parts = [self.numbered(_NAMES) for _ in range(self.draw(st.integers(1, 3)))]
        return self.one_of([".", " . ", ".\t"]).join(parts)

    def value(self, depth: int = 0) -> str:
        kind = self.draw(st.integers(0, 5)) if depth < 3 else 0
        if kind < 4:
            return self.numbered(_SCALARS)
        count = self.draw(st.integers(0, 3))
        inner = depth + 1
        if kind == 4:
            items, brackets = [self.value(inner) for _ in range(count)], "[]"
        else:
            items, brackets = [f"{self.key()} = {self.value(inner)}" for _ in range(count)], "{}"
        separated = [self.one_of(_NOISE) + item + self.one_of(_NOISE) for item in items]
        trailing = self.one_of(["", ","]) if items else ""
        return brackets[0] + ",".join(separated) + trailing + self.one_of(_NOISE) + brackets[1]

    def statement(self) -> str:
        kind = self.draw(st.integers(0, 5))
        if kind == 0:
            return f"[{self.key()}]"
        if kind == 1:
            header = f"[[ {self.key()} ]]"
            inner = header[3:-3]
            return f"{header}\n{header}\nk = {self.value()}\n[{inner}.sub]\nk=1\n{header} # again"
        return f"{self.key()} ={self.value()}"

    def text(self) -> str:
        lines = [
            self.one_of(_NOISE) + self.statement() + self.one_of(["", " # c"])
            for _ in range(self.draw(st.integers(1, 6)))
        ]
        return self.one_of(["\n", "\r\n"]).join("\n".join(lines).split("\n"))


@given(st.data())
def test_every_span_of_any_document_reads_back(data):
    assert_spans_read_back(_Document(data.draw).text())


def test_a_value_of_several_lines_is_shown_to_the_end_of_its_first_line():
    spans = Spans('a = """one\ntwo"""', "file.toml")
    assert spans.value(("a",)) == Location("file.toml", 1, 5, 11, 'a = """one')
    assert spans.text[slice(*spans.value_offsets(("a",)))] == '"""one\ntwo"""'


def test_a_table_of_headers_stands_at_its_own_header_rather_than_at_a_child():
    spans = Spans("[a.b]\nx = 1\n[a]\ny = 2\n", "file.toml")
    assert spans.value(("a",)) == Location("file.toml", 3, 2, 3, "[a]")
    assert spans.known(("a", "missing", "b", 0)) == ("a", "b")
    assert ("a", "b", "x") in spans
    assert ("a", "z") not in spans


def test_characters_that_steer_a_terminal_are_not_repeated():
    source = Spans("a = 1 # \x85\u202e", "file.toml").key(("a",)).source
    assert source == "a = 1 # \ufffd\ufffd"


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "a = " + "{ a = " * (MAX_DEPTH + 1) + "1" + " }" * (MAX_DEPTH + 1),
        "[" + ".".join("a" * (MAX_DEPTH + 1)) + "]",
        ".".join("a" * (MAX_DEPTH + 1)) + " = 1",
    ],
)
def test_deep_nesting_is_refused(text):
    with pytest.raises(NestingError):
        Spans(text, "file.toml")


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"k{i}.a = [1, 2, {{ b = 3 }}]" for i in range(5_000)),
        'a = """' + '\\n"' * 75_000 + 'x"""',
        "# " + "x" * 225_000,
        "a = [" + "1," * 100_000 + "]",
        "[[a]]\n" * 25_000,
    ],
)
def test_a_long_text_is_scanned_in_linear_time(text):
    started = time.process_time()
    Spans(text, "file.toml")
    assert time.process_time() - started < 2.5
