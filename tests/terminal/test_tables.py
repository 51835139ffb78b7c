"""Tables fit the terminal, and lose nothing on the way."""

from __future__ import annotations

import os
import re

import pytest

from qrecipe.terminal import tables

HEADER = ("site", "operation", "verdict", "decided by", "why")
ROWS = [
    ("block1.depthwise.0", "Conv2d+BatchNorm2d+ReLU", "quantized", "global = int8", ""),
    ("pool", "AdaptiveAvgPool2d", "passthrough", "global = int8", "follows block2:add"),
    ("a" * 70, "Linear", "float", 'module_name "head" = float', "the last layer decides"),
]


def rendered(monkeypatch, columns, rows=ROWS, spare=(), noted=None):
    monkeypatch.setattr(tables, "_is_on_terminal", lambda: columns is not None)
    size = os.terminal_size((columns or 1, 24))
    monkeypatch.setattr("shutil.get_terminal_size", lambda: size)
    return tables.render_table(HEADER, rows, spare, noted).splitlines()


def letters(lines):
    return sorted(re.sub(r"[\s─]", "", "".join(lines)))


def test_in_a_file_a_row_is_one_line(monkeypatch):
    assert len(rendered(monkeypatch, None)) == 2 + len(ROWS)


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_on_a_terminal_no_line_is_too_wide_and_nothing_is_lost(monkeypatch, columns):
    lines = rendered(monkeypatch, columns)
    assert max(map(len, lines)) <= columns
    assert letters(lines) == letters(rendered(monkeypatch, None))


def test_words_stay_whole_where_there_is_room(monkeypatch):
    text = "\n".join(rendered(monkeypatch, 80, ROWS[:2]))
    for word in ("passthrough", "quantized", "BatchNorm2d", "block1.depthwise.0", "follows"):
        assert word in text


def test_cells_are_wrapped_where_the_fewest_rows_need_it(monkeypatch):
    rows = [
        *[("block.depthwise.0", "Conv2d+BatchNorm2d+ReLU", "quantized", "", "")] * 6,
        ("pool", "AdaptiveAvgPool2d", "passthrough", "", "moves the integers of block2:add"),
    ]
    lines = rendered(monkeypatch, 90, rows)
    assert sum("Conv2d+BatchNorm2d+ReLU" in line for line in lines) == 6
    assert len(lines) == 2 + 6 + 3


def test_what_a_column_repeats_is_said_once_below_a_table_that_is_too_wide(monkeypatch):
    why = "on onednn's kernel: fbgemm's is slower unless channels are a multiple of 32"
    rows = [
        *[(f"features.{n}", "Conv2d+Hardswish", "quantized", "", why) for n in range(6)],
        ("pool", "AdaptiveAvgPool2d", "passthrough", "", "follows features.5"),
    ]
    lines = rendered(monkeypatch, 80, rows, noted=4)
    assert [line for line in lines if line.endswith("[1]")] == lines[2:8]
    assert "follows features.5" in lines[8]
    assert " ".join(lines[9:]).strip() == f"[1] {why}"
    assert max(map(len, lines)) <= 80
    wide = rendered(monkeypatch, 200, rows, noted=4)
    assert sum(line.endswith(why) for line in wide) == 6


@pytest.mark.parametrize("columns", [80, 120])
def test_no_word_is_broken_in_the_middle(monkeypatch, columns):
    rows = [
        ("self_attn.attention", "ScaledDotProductAttention", "float", "global = float", "a rule"),
        ("pool", "AdaptiveAvgPool2d", "passthrough", "global = int8", "follows block2:add"),
    ]
    text = "\n".join(rendered(monkeypatch, columns, rows))
    for row in rows:
        for word in "+".join(row).replace(" ", "+").split("+"):
            assert word in text


def test_a_word_that_has_to_be_broken_is_broken_between_its_parts(monkeypatch):
    lines = rendered(monkeypatch, 30, [("conv", "AdaptiveAvgPool2d", "float", "", "")])
    assert any("Pool2d" in line for line in lines)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("builtin:x86-static-histogram", ["builtin:", "x86-", "static-", "histogram"]),
        ("block2.depthwise.0", ["block2.", "depthwise.", "0"]),
        ("ScaledDotProductAttention", ["Scaled", "Dot", "Product", "Attention"]),
        ("9.32e-03", ["9.32e-03"]),
        ("-8.862", ["-8.862"]),
    ],
)
def test_the_parts_of_a_word(word, parts):
    assert tables._BETWEEN_PARTS.split(word) == parts


def test_paragraphs_are_wrapped_between_words_on_a_terminal_alone(monkeypatch):
    text = "Each time is the lower quartile of 15 rounds.\n  qrecipe-a-long-word" * 2
    rendered(monkeypatch, 30)
    lines = tables.wrapped(text).split("\n")
    assert max(map(len, lines)) <= 60
    assert lines[0] == "Each time is the lower"
    rendered(monkeypatch, None)
    assert tables.wrapped(text) == text


def test_what_fits_is_not_touched(monkeypatch):
    assert rendered(monkeypatch, 300) == rendered(monkeypatch, None)


def test_columns_that_can_be_spared_are_left_out_in_their_order_where_words_do_not_fit(monkeypatch):
    shown = [
        [word for word in HEADER if any(word.split()[0] in line for line in lines[:2])]
        for lines in (
            rendered(monkeypatch, columns, ROWS[:2], (3, 2)) for columns in (None, 71, 62, 49)
        )
    ]
    assert shown == [
        list(HEADER),
        list(HEADER),
        ["site", "operation", "verdict", "why"],
        ["site", "operation", "why"],
    ]


def test_a_terminal_of_one_column_gets_a_table_all_the_same(monkeypatch):
    assert letters(rendered(monkeypatch, 1)) == letters(rendered(monkeypatch, None))
