"""What the project says about its own modules and names, held against them."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from types import FunctionType

import pytest
import tomli
from places import ROOT

import qrecipe

PACKAGE = ROOT / "qrecipe"
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}


def modules():
    """The modules and packages right below the package."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_every_layer_is_a_module_and_every_module_stands_in_one_layer():
    named = [name for line in CONTRACTS["layers"]["layers"] for name in re.findall(r"\w+", line)]
    assert sorted(named) == sorted(set(named))
    assert sorted(set(named) - modules()) == []
    assert modules() - set(named) == set(CONTRACTS["layers"]["exhaustive_ignores"])


ROWS = [re.findall(r"\w+", line) for line in CONTRACTS["layers"]["layers"]]
PACKAGES = [name for row in ROWS for name in row if (PACKAGE / name).is_dir() and name != "cli"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_says_what_it_may_import_and_imports_no_more(name):
    docstring = " ".join((PACKAGE / name / "__init__.py").read_text(encoding="utf-8").split())
    _, verb, said = docstring.partition("May import ")
    assert verb
    named = set(re.findall(r"`(\w+)`", said))
    level = next(number for number, row in enumerate(ROWS) if name in row)
    highest = min(
        (number for number, row in enumerate(ROWS) if named & set(row)), default=level + 1
    )
    assert highest > level
    below = {unit for row in ROWS[highest:] for unit in row} if "below" in said else set()
    texts = [path.read_text(encoding="utf-8") for path in (PACKAGE / name).rglob("*.py")]
    imported = {
        unit for text in texts for unit in re.findall(r"^\s*from qrecipe\.(\w+)", text, re.M)
    }
    assert imported - named - below - {name, "_version"} == set()


def test_every_module_that_is_kept_from_torch_is_there():
    named = CONTRACTS["torch-free"]["source_modules"]
    assert named
    paths = [ROOT.joinpath(*name.split(".")) for name in named]
    assert [
        path for path in paths if not path.is_dir() and not path.with_suffix(".py").exists()
    ] == []


def test_type_checkers_take_every_name_for_public():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    assert [each.name for each in aliases] == [each.asname for each in aliases]  # or it is private
    assert sorted(qrecipe.__all__) == sorted(each.name for each in aliases)


@pytest.mark.parametrize("name", qrecipe._HOME)
def test_every_public_name_leads_home(name):
    value = getattr(import_module(qrecipe._HOME[name]), name)
    assert getattr(qrecipe, name) is value
    assert name in dir(qrecipe)
    assert value.__doc__ or not isinstance(value, (type, FunctionType))  # an alias has none


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise"):
        _ = qrecipe.quantise
