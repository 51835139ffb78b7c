"""``qrecipe schema``, held against an independent validator and against what recipes take."""

from __future__ import annotations

import ast
import copy
import json
import re
from itertools import filterfalse, islice

import pytest
import tomli
from command_line import run
from distributions import install
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft4Validator, Draft6Validator, Draft7Validator
from places import ROOT
from pydantic import BaseModel
from recipe_texts import FULL
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.errors.findings import RecipeError
from qrecipe.recipe import json_schema
from qrecipe.recipe.json_schema import recipe_schema
from qrecipe.recipe.recipe import parse_recipe
from qrecipe.recipe.references import builtin_names
from qrecipe.recipe.schema import FxTable, LintTable, QatTable, RecipeTable, RuleTable, TensorSpec
from qrecipe.recipe.toml.writer import toml_key, toml_value
from qrecipe.registry import table as registered

VALIDATORS = [Draft4Validator, Draft6Validator, Draft7Validator]
EXTENDING = 'format = 1\nextends = "builtin:x86-static"\n'


@pytest.fixture(scope="module")
def schema():
    return json.loads(run("schema").stdout)


def errors(schema, text, validator=Draft7Validator):
    return [error.message for error in validator(schema).iter_errors(tomli.loads(text))]


def refuses(text):
    try:
        parse_recipe(text)
    except RecipeError:
        return True
    return False


@pytest.mark.parametrize("validator", VALIDATORS)
def test_the_schema_is_one_in_every_draft_that_editors_know(schema, validator):
    validator.check_schema(schema)
    assert not {"$defs", "const", "exclusiveMinimum", "propertyNames"} & set(keys(schema))


def keys(node):
    if isinstance(node, dict):
        yield from node
        for value in node.values():
            yield from keys(value)
    elif isinstance(node, list):
        for value in node:
            yield from keys(value)


@pytest.mark.parametrize("validator", VALIDATORS)
@pytest.mark.parametrize("name", builtin_names())
def test_shipped_recipes_are_valid_for_an_independent_validator(schema, name, validator):
    text = (ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    assert errors(schema, text, validator) == []


INVALID = [
    ("bakend = 'x86'\n", "bakend"),
    ("backend = 'x87'\n", "x87"),
    ("format = 2\n", "2"),
    ("phase = 'train'\n", "train"),
    ("[tensor.weight]\nobserver = 'minmaxx'\n", "minmaxx"),
    ("[tensor.weight]\nobserver = 'fixed_qparams'\n", "fixed_qparams"),
    ("[tensor.weight]\nobserver = { name = 'histogram', bin = 2 }\n", "bin"),
    ("[tensor.weight]\nobserver = { name = 'histogram', bins = '2' }\n", "2"),
    ("[tensor.weight]\nobserver = { name = 'histogram', bins = 2 }\n", "2"),
    ("[tensor.weight]\nobserver = { bins = 64 }\n", "bins"),
    ("[tensor.weight]\nobserver = { name='moving_average_minmax', averaging_constant=0 }\n", "0"),
    ("[tensor.weight]\ndtype = 'int9'\n", "int9"),
    ("[tensor.weight]\nquant_min = 1.5\n", "1.5"),
    ("[tensor.weight]\neps = 0\n", "0"),
    ("[tensor.empty]\n", "{}"),
    ("[qconfig.int8]\nwieght = 'weight'\n", "wieght"),
    ("[qconfig.float]\nweight = 'weight'\n", "float"),
    ("[rules.module_nam]\nfc = 'float'\n", "module_nam"),
    ("[rules.module_name]\nfc = 3\n", "3"),
    ("[rules.module_name]\nfc = { expect = 3 }\n", "expect"),
    ("[rules.module_name]\nfc = { qconfig = 'int8', expect = -1 }\n", "-1"),
    ("[rules.module_name]\nfc = { qconfig = 'int8', weight = 'weight' }\n", "weight"),
    ("[calibration]\nmin_batches = 0\n", "0"),
    ("[qat]\nepochs_fraction = 0\n", "0"),
    ("[fx]\nroots = 'backbone'\n", "backbone"),
    ("[lint]\nignore = ['QR301']\n", "QR301"),
    ("[lint]\nignore = ['E501']\n", "E501"),
    ("extends = { recipe = './a.toml', sha256 = '12' }\n", "12"),
    ("extends = [{ sha256 = '12' }]\n", "12"),
]


@pytest.mark.parametrize("validator", VALIDATORS)
@pytest.mark.parametrize(("text", "part"), INVALID)
def test_mistakes_are_refused_by_the_schema_and_by_qrecipe(schema, text, part, validator):
    found = errors(schema, text, validator)
    assert found
    assert any(part in message for message in found), found
    assert refuses(text)


def texts():
    """Every text in the tests and the documentation that is TOML and could be a recipe."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = file.read_text(encoding="utf-8")
        yield from re.findall(r"^```toml.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def documents():
    for text in dict.fromkeys(texts()):
        if not text or as_json(text) is None:  # then it is no TOML after another text either
            continue
        for whole in (text, EXTENDING + text, FULL + text):
            data = as_json(whole)
            if data is not None and data.keys() <= RecipeTable.model_fields.keys():
                yield whole, data


def as_json(text):
    """What a TOML text holds, unless it is none or has values that JSON does without."""
    try:
        data = tomli.loads(text)
        json.dumps(data)
    except (ValueError, TypeError, RecursionError):
        return None
    return data


def test_what_the_schema_refuses_in_the_tests_and_documents_qrecipe_refuses_too(schema):
    validator = Draft7Validator(schema)
    good, bad = [], []
    for text, data in documents():
        (good if validator.is_valid(data) else bad).append(text)
    assert [text for text in bad if not refuses(text)] == []
    assert len(bad) > 40
    assert len([*islice(filterfalse(refuses, good), 101)]) > 100


VALUES = st.one_of(
    st.sampled_from(["int8", "weight", "x86", "minmax", "float", "./a.toml", "QR214", ""]),
    st.sampled_from([-1, 0, 1, 2, 1024, 0.5, 1.0, True, [], ["a"], {}, {"name": "minmax"}]),
    st.sampled_from([{"qconfig": "int8"}, {"recipe": "builtin:x86-static"}, {"weight": "weight"}]),
)
NAMES = sorted(
    {*("observer", "weight", "activation", "int8", "fc", "name", "other", "global", "bins")}
    | {
        name
        for table in (RecipeTable, TensorSpec, RuleTable, QatTable, FxTable, LintTable)
        for name in table.model_fields
    }
)


@given(st.lists(st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), VALUES)))
def test_whatever_is_put_into_a_recipe_the_schema_refuses_no_more_than_qrecipe(changes):
    data = tomli.loads(EXTENDING + FULL.partition("\n")[2])
    for path, value in changes:
        table = data
        for step in path[:-1]:
            table = table.setdefault(step, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table[path[-1]] = copy.deepcopy(value)
    if not Draft7Validator(SCHEMA).is_valid(data):
        text = "".join(f"{toml_key(key)} = {toml_value(value)}\n" for key, value in data.items())
        assert refuses(text)


SCHEMA = recipe_schema()


# plugins


class Options(BaseModel):
    """Arguments with a required one."""

    quantile: float
    sides: list[float] = []


def test_registered_names_are_known_with_their_arguments():
    qrecipe.register_observer("percentile_of_tests", options=Options)(
        type("Percentile", (MinMaxObserver,), {})
    )
    try:
        schema = recipe_schema()
    finally:
        registered.remove("observer", "percentile_of_tests")
    Draft7Validator.check_schema(schema)
    text = "[tensor.weight]\nobserver = %s\n"
    good = "{ name = 'percentile_of_tests', quantile = 0.9, sides = [1, 2.5] }"
    assert errors(schema, text % good) == []
    assert errors(recipe_schema(), text % good)
    for bad in ("'percentile_of_tests'", good.replace("0.9", "'high'"), good.replace("side", "x")):
        assert errors(schema, text % bad)


def test_a_plugin_that_is_installed_and_not_imported_is_known_by_name(monkeypatch):
    monkeypatch.setattr(json_schema, "known_names", lambda kind: ("minmax", "percentile"))
    schema = recipe_schema()
    Draft7Validator.check_schema(schema)
    for value in ("'percentile'", "{ name = 'percentile', whatever = [1] }"):
        assert errors(schema, f"[tensor.weight]\nobserver = {value}\n") == []
    assert errors(schema, "[tensor.weight]\nobserver = 'histogram'\n")


def test_the_schema_names_what_installed_distributions_claim_and_imports_none(
    tmp_path, monkeypatch
):
    points = {"observer.of_schema_tests": "plugin_of_schema_tests"}
    source = "raise SystemExit('imported')"
    install(tmp_path, "acme-observers", points, plugin_of_schema_tests=source)
    monkeypatch.syspath_prepend(str(tmp_path))
    schema = recipe_schema()
    text = "[tensor.weight]\n%s = 'of_schema_tests'\n"
    assert errors(schema, text % "observer") == []
    assert errors(schema, text % "fake_quant")


def test_a_plugin_of_the_command_line_is_in_the_schema(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_tests.py").write_text(
        "import qrecipe\nfrom torch.ao.quantization.observer import MinMaxObserver\n"
        "@qrecipe.register_observer('house_of_tests')\nclass House(MinMaxObserver):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        found = json.loads(run("schema", "--plugin", "plugin_of_tests.py").stdout)
    finally:
        registered.remove("observer", "house_of_tests")
    assert "house_of_tests" in found["definitions"]["observer"]["anyOf"][0]["enum"]
    assert run("schema", "--plugin", "gone.py").exit_code == 2
