"""What the pages for contributors name is there, and what they say of the code is true of it."""

from __future__ import annotations

import re
from importlib import import_module
from typing import get_args

import pytest
import tomli
from places import ROOT, functions_of

from qrecipe.execution.engine import ENGINES
from qrecipe.execution.executors import _EXECUTORS
from qrecipe.planning.backend import _BACKEND_CONFIGS
from qrecipe.planning.plan import EXPORTED, Executor
from qrecipe.recipe.schema import Backend

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *(ROOT / "CONTRIBUTING.md", DOCS / "how-it-is-built.md", DOCS / "decisions" / "index.md"),
        *sorted((DOCS / "extend").glob("*.md")),
    )
}
SUFFIXES = ("py", "toml", "md", "json", "svg", "txt", "yml", "yaml")

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")


def prose(page):
    return FENCED.sub("", PAGES[page].read_text(encoding="utf-8"))


def words(page):
    """What stands in backticks, word by word, without the brackets of a call."""
    return [word.removesuffix("()") for code in CODE.findall(prose(page)) for word in code.split()]


def is_path(word):
    return "://" not in word and "::" not in word and ("/" in word or word.endswith(_ENDINGS))


_ENDINGS = tuple(f".{suffix}" for suffix in SUFFIXES)
_MADE_BY_INSTALLING = ".venv/bin/"


def is_there(name):
    """Whether a dotted name of qrecipe, its first part left out, or of torch leads somewhere."""
    parts = name.split(".")
    for prefix in ("qrecipe.", ""):
        for count in range(len(parts), 0, -1):
            try:
                found = import_module(prefix + ".".join(parts[:count]))
            except ImportError:
                continue
            return _leads(found, parts[count:])
    return False


def _leads(found, names):
    for name in names:
        if name in getattr(found, "model_fields", {}) or name in getattr(
            found, "__annotations__", {}
        ):
            return True
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page):
    paths = [word for word in words(page) if is_path(word)]
    named = [path for path in paths if not path.startswith(_MADE_BY_INSTALLING)]
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    assert [
        link for link in LINK.findall(prose(page)) if not (PAGES[page].parent / link).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_name_leads_to_something(page):
    named = [word for word in words(page) if DOTTED.fullmatch(word) and not is_path(word)]
    assert [name for name in named if not is_there(name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page):
    named = [found for word in words(page) for found in TEST.findall(word)]
    assert [test for path, test in named if test not in functions_of(path)] == []


def test_a_name_that_is_not_there_would_be_found():
    assert is_there("planning.kernels.refusal")
    assert is_there("planning.plan.Plan.executor")
    assert is_there("torch.nn.Linear")
    assert not is_there("planning.kernels.refusel")
    assert not is_there("planning.plan.Plan.executer")
    assert not is_there("planning.kernel.refusal")
    assert is_path("qrecipe/errors/findings.py")
    assert not is_path("errors.findings.CODES")


def test_contributing_leads_to_every_page_on_extending():
    linked = set(LINK.findall(prose("CONTRIBUTING.md")))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_the_list_of_decisions_holds_every_decision_once_and_in_order():
    index = DOCS / "decisions" / "index.md"
    rows = re.findall(
        r"^\| (\d+) \| \[([^\]]+)\]\((\d{4}-[\w-]+\.md)\) \| (.+) \|$",
        index.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    there = sorted(path.name for path in index.parent.glob("*.md") if path != index)
    assert [file for _, _, file, _ in rows] == there
    for number, title, file, _ in rows:
        heading = (index.parent / file).read_text(encoding="utf-8").splitlines()[0]
        assert heading == f"# {number}. {title}"


# --- what the pages say of backends and executors


def test_every_backend_has_a_config_and_is_executed_or_exported():
    names = set(get_args(Backend))
    assert set(_BACKEND_CONFIGS) == names
    assert set(ENGINES) | EXPORTED == names
    assert not set(ENGINES) & EXPORTED


def test_every_executor_is_a_package_that_is_kept_apart():
    assert _EXECUTORS.keys() == {*get_args(Executor)}
    packages = {each.__package__ for each in _EXECUTORS.values()}
    assert len(packages) == len(_EXECUTORS)
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {each["id"]: each for each in project["tool"]["importlinter"]["contracts"]}
    assert {*contracts["executors"]["modules"]} == packages
    assert {*contracts["registry"]["protected_modules"]} == packages
    there = {path.parent.name for path in (ROOT / "qrecipe" / "execution").glob("*/__init__.py")}
    assert {f"qrecipe.execution.{name}" for name in there} == packages
