"""The tests of the documentation find what is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import blocks, close_session, commands, difference, open_session
from sybil import Document
from sybil.example import SybilFailure

TICKS = "`" * 3


def run_page(folder, *parts, name="page.md"):
    """Every block of a page of these, given as (info, lines)."""
    page = folder / name
    texts = [f"{TICKS}{info}\n{text}\n{TICKS}\n" for info, text in parts]
    page.write_text("\n".join(texts), encoding="utf-8")
    document = Document.parse(str(page), blocks)
    open_session(document.namespace)
    try:
        for example in document.examples():
            example.evaluate()
    finally:
        close_session(document.namespace)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("one\ntwo", "one\ntwo\n"),
        ("one\n...\nfour", "one\ntwo\nthree\nfour"),
        ("one\n...", "one"),
        ("...\nlast\n...\nend", "last\nfirst\nlast\nmiddle\nend"),
        ("lost ... found", "lost 3 of 4, found"),
        ("a   b ──── c", "a b ──────── c"),
        ("SQNR 28.9 dB", "SQNR 29.0 dB"),
        ("0.984", "0.985"),
        ("latency 15.95 ms", "latency 3.1 ms"),
        ("took 12 s", "took 3 min"),
    ],
)
def test_what_agrees_is_no_difference(shown, printed):
    assert difference(shown, printed) is None


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("one", "one\ntwo"),
        ("one\ntwo", "one"),
        ("one\n...\nfour", "one\ntwo\nthree"),
        ("SQNR 28.9 dB", "SQNR 28.7 dB"),
        ("0.984", "0.986"),
        ("1234.56", "1234.00"),
        ("torch 2.13.0", "torch 2.14.0"),
        ("    6 | line\n      | ^^^", "    6 | line\n      |  ^^^"),
        ("3.66 times", "3.70 times"),
        ("28.9", "-28.9"),
        ("10 sites", "11 sites"),
        ("a.b", "a-b"),
        ("latency 15.95 ms", "latency 15.95 dB"),
        ("lost ... found", "lost nothing"),
    ],
)
def test_what_does_not_agree_is_shown_beside_what_was_printed(shown, printed):
    found = difference(shown, printed)
    assert found is not None
    assert shown in found
    assert printed in found


def test_commands_end_where_the_next_begins_and_go_on_behind_a_backslash():
    text = "$ one \\\n    more\nfirst\nsecond\n$ two\n"
    assert list(commands(text)) == [("one \\\n    more", "first\nsecond"), ("two", "")]


def test_a_page_is_one_session_and_leaves_nothing_behind(tmp_path):
    before = Path.cwd()
    run_page(
        tmp_path,
        ('toml title="own.toml"', 'format = 1\nextends = "builtin:x86-static"'),
        ('python title="model_of_page.py"', "WIDTH = 3"),
        ("python", "from model_of_page import WIDTH\nprint(WIDTH)"),
        ("text", "3"),
        ('python title="model_of_page.py"', "WIDTH = 4"),
        ("python", "from model_of_page import WIDTH as WIDER\nprint(WIDTH, WIDER)"),
        ("text", "3 4"),
        (
            "console",
            "$ qrecipe check own.toml\n1 recipe checked: no errors\n$ cat own.toml | wc -l\n2",
        ),
    )
    assert Path.cwd() == before
    with pytest.raises(ImportError):
        import model_of_page  # noqa: F401


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (("console", "$ qrecipe check builtin:x86-static\n2 recipes checked"), "1 recipe checked"),
        (
            ("console", "$ qrecipe check builtin:x86-statik"),
            r"exit status 1\nQR120",
        ),
        (("console", "$ false"), "exit status 1"),
        (("text", "what nothing printed"), "comes after the Python"),
        (("sh", "true"), "sh blocks are for the first commands"),
        (("fortran", "END"), 'no way is known to run a block of "fortran"'),
        (("", "anything"), 'no way is known to run a block of ""'),
    ],
)
def test_a_wrong_block_fails_and_says_why(tmp_path, part, message):
    with pytest.raises(SybilFailure, match=message):
        run_page(tmp_path, part)


def test_tests_and_tools_are_there_to_be_run_and_torch_keeps_to_one_thread(tmp_path):
    run_page(
        tmp_path,
        ("console", "$ ls tests/support/nets.py\ntests/support/nets.py"),
        ("console", "$ python tools/on_torch.py --help\n...usage: on_torch.py...\n..."),
        ("python", "import torch\nprint(torch.get_num_threads())"),
        ("text", "1"),
    )


@pytest.mark.parametrize(
    ("title", "text", "message"),
    [
        ('toml title="own.toml"', "format 1", "Expected '='"),
        ('python title="own.py"', "def factory(:", "invalid syntax"),
        ('yaml title="own.yaml"', "a: [", "while parsing"),
    ],
)
def test_a_file_that_is_none_of_its_kind_fails(tmp_path, title, text, message):
    with pytest.raises(Exception, match=message):
        run_page(tmp_path, (title, text))


def test_a_file_that_no_later_block_uses_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"no later block uses it: \['own.py'\]"):
        run_page(tmp_path, ('python title="own.py"', "WIDTH = 3"))


@pytest.mark.parametrize("after", [[], [("python", "print(2)")]])
def test_what_is_printed_and_not_shown_fails(tmp_path, after):
    with pytest.raises((AssertionError, SybilFailure), match="no text block shows"):
        run_page(tmp_path, ("python", "print(1)"), *after)


def test_a_warning_that_the_page_does_not_name_fails(tmp_path):
    warns = "import warnings\nwarnings.warn('QR201 few')  # "
    with pytest.raises(SybilFailure, match="the page does not say so: QR299"):
        run_page(tmp_path, ("python", warns.replace("QR201", "QR' + '299")))
    run_page(tmp_path, ("python", warns))


def test_the_exit_status_is_what_the_block_says(tmp_path):
    run_page(tmp_path, ("console", "$ sh -c 'echo gone; exit 3'  # exit status 3\ngone"))
    run_page(tmp_path, ("console", "$ sh -c 'echo QR301; exit 1'\nQR301"))
    for shown in ("gone", "...", "QR301"):
        with pytest.raises(SybilFailure, match="exit status 3"):
            run_page(tmp_path, ("console", f"$ sh -c 'echo {shown}; exit 3'\n{shown}"))
    with pytest.raises(SybilFailure, match="exit status 0"):
        run_page(tmp_path, ("console", "$ true  # exit status 1"))


def test_a_recipe_with_a_mistake_fails(tmp_path):
    with pytest.raises(Exception, match="QR101"):
        run_page(tmp_path, ("toml", "format = 1\nobserver = 3"))
