"""What rules cost: work grows as sites, rules and names do, and a report stays short."""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import run
from shares import every
from torch import nn
from work import growth

from qrecipe.authoring.diff import value_changes
from qrecipe.authoring.lock.check import compare
from qrecipe.authoring.lock.file import make_lock
from qrecipe.errors.findings import SHOWN, PlanError, QRecipeError
from qrecipe.model.call import Inputs
from qrecipe.planning.decide import plan_of
from qrecipe.planning.inventory import inventory_of
from qrecipe.recipe.recipe import parse_recipe
from qrecipe.rules.resolution import resolve

HEAD = 'format = 1\nbackend = "x86"\n'
SPEC = 'dtype = "int8"\nobserver = "minmax"\nqscheme = "per_tensor_symmetric"\n'
REFUSED = SPEC.replace("int8", "int32")
GLOBAL = f'{HEAD}[rules]\nglobal = "float"\n'
LOCK = Path("net.lock.toml")
SIZE = 40
LINEAR = 2.2
"""What twice the size may cost at most; quadratic work would cost four times as much."""


def rules(line, tier="module_name", more=""):
    def text(count):
        lines = "\n".join(line.replace("$", str(number)) for number in range(count))
        return f"{GLOBAL}{more}[rules.{tier}]\n{lines}\n"

    return text


KINDS = {
    "optional": rules('"absent.$" = { qconfig = "float", optional = true }'),
    "unmatched": rules('"layers.x$" = "float"'),
    "a rule for each site": rules('"layers.$.0" = "float"'),
    "wrong numbers": rules('"layers.$.0" = { qconfig = "float", expect = 9 }'),
    "members": rules('"layers.$.1" = { weight = "w" }', more=f"[tensor.w]\n{SPEC}"),
    "uncalled modules": rules('"layers.$.uncalled" = "float"'),
    "types": rules('"net.Layer$" = "float"', "module_type"),
    "optional types": rules('"net.Layer$" = { qconfig = "float", optional = true }', "module_type"),
    "functions": rules('"net.layer$" = "float"', "function"),
    "refused": rules(
        '"layers.$.0" = { weight = "w", activation = "w" }', more=f"[tensor.w]\n{REFUSED}"
    ),
    "shadowed": lambda count: (
        rules('"layers.$" = { weight = "w" }', more=f"[tensor.w]\n{SPEC}")(count)
        + "\n".join(f'"layers.{number}.0" = "float"' for number in range(count))
    ),
}


class Layer(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.ReLU())
        self.uncalled = nn.Linear(2, 2)

    def forward(self, x):
        return self[1](self[0](x))


class Layers(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(count)))

    def forward(self, x):
        return self.layers(x)


INPUTS = Inputs.from_batch(torch.ones(2, 2))


@cache
def model(sites):
    return Layers(sites).eval()


@cache
def inventory(sites):
    """What `plan` finds in a model with so many sites."""
    return inventory_of(model(sites), parse_recipe(GLOBAL), INPUTS)


@cache
def recipe(kind, count):
    return parse_recipe(KINDS[kind](count))


def planned(sites, a_recipe):
    try:
        return plan_of(inventory(sites), a_recipe, INPUTS)
    except PlanError as error:
        return error.plan


@pytest.mark.parametrize("kind", every(2, KINDS))
def test_a_plan_costs_as_much_as_its_sites_and_rules_together(kind):
    for size in (4, SIZE, 2 * SIZE):
        inventory(size), recipe(kind, size)
    assert growth(lambda size: planned(size, recipe(kind, size)), SIZE) < LINEAR


@pytest.mark.parametrize("kind", every(3, ["shadowed", "a rule for each site", "unmatched"]))
@pytest.mark.parametrize(
    "use",
    [
        str,
        lambda plan: plan.to_json(),
        lambda plan: plan.explain("layers"),
        lambda plan: plan.explain("layers.1.0"),
        lambda plan: compare(make_lock(plan, LOCK), make_lock(plan, LOCK)),
    ],
    ids=["text", "json", "explain", "explain a site", "lock"],
)
def test_what_is_done_with_a_plan_costs_as_much_as_the_plan_is_large(kind, use):
    plans = {size: planned(size, recipe(kind, size)) for size in (4, SIZE, 2 * SIZE)}
    assert growth(lambda size: use(plans[size]), SIZE) < LINEAR


GLOBS = rules('"layers.*x$" = { qconfig = "float", optional = true }')


def test_globs_cost_as_much_as_there_are_names_and_as_much_as_there_are_globs():
    for size in (4, 8 * SIZE):
        parse_recipe(GLOBS(size))
    fifty = parse_recipe(GLOBS(50)).rules
    by_names = growth(lambda size: resolve(inventory(size).structure, fifty), SIZE)
    assert by_names < LINEAR
    some = {size: parse_recipe(GLOBS(size)).rules for size in (4, 4 * SIZE, 8 * SIZE)}
    structure = inventory(10).structure
    assert growth(lambda size: resolve(structure, some[size]), 4 * SIZE) < LINEAR


UNITS = ("**.{l*,?a}" * 45, "layers.*" + "*1*0" * 110, "{c,l}" * 90)


@pytest.mark.parametrize("unit", every(3, UNITS), ids=["deep", "stars", "braces"])
def test_globs_as_long_as_allowed_cost_as_much_as_there_are_names_and_globs(unit):
    long = rules(f'"{unit}$" = {{ qconfig = "float", optional = true }}')
    few = parse_recipe(long(5)).rules
    assert growth(lambda size: resolve(inventory(size).structure, few), SIZE) < LINEAR
    some = {size: parse_recipe(long(size)).rules for size in (4, 10, 20)}
    structure = inventory(10).structure
    assert growth(lambda size: resolve(structure, some[size]), 10) < LINEAR
    assert growth(lambda size: parse_recipe(long(size)), 10) < LINEAR


MERGED = {
    "rules": KINDS["optional"],
    "globs": GLOBS,
    "unknown types": rules('"torch.nn.Layer$" = "float"', "module_type"),
    "undefined qconfigs": rules('"layers.$" = "absent$"'),
    "undefined qconfigs beside many": lambda count: (
        rules('"layers.$" = "absent$"')(count)
        + f"[tensor.w]\n{SPEC}"
        + "".join(f'[qconfig.known{number}]\nweight = "w"\n' for number in range(count))
    ),
    "unused tensors": lambda count: (
        GLOBAL + "".join(f"[tensor.unused{number}]\n{SPEC}" for number in range(count))
    ),
    "nothing to inherit": rules('"layers.$" = "inherit"'),
    "wrong values": rules('"layers.$" = 3'),
    "misspelled keys": rules('"layers.$" = { qconfg = "float" }'),
    "one line": lambda count: (
        f'{HEAD}rules = {{ global = "float", module_name = {{ '
        + ", ".join(f'"layers.{number}" = "float"' for number in range(count))
        + " } }\n"
    ),
}


def read(text):
    try:
        return parse_recipe(text)
    except QRecipeError as error:
        return str(error)


@pytest.mark.parametrize("kind", every(2, MERGED))
def test_reading_a_recipe_costs_as_much_as_it_is_long(kind):
    assert growth(lambda count: read(MERGED[kind](count)), SIZE) < LINEAR


def test_comparing_recipes_costs_as_much_as_they_are_long():
    pairs = {
        size: (parse_recipe(KINDS["optional"](size)), parse_recipe(GLOBS(size)))
        for size in (4, SIZE, 2 * SIZE)
    }
    assert growth(lambda size: list(value_changes(*pairs[size])), SIZE) < LINEAR


@pytest.fixture
def compared(monkeypatch):
    """The names for which similar ones are looked for."""
    names = []

    def get_close_matches(word, *arguments, **keywords):
        names.append(word)
        return original(word, *arguments, **keywords)

    original = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", get_close_matches)
    return names


def test_a_report_of_a_thousand_rules_shows_twenty_and_suggests_for_those(compared):
    with pytest.raises(PlanError) as caught:
        plan_of(inventory(SIZE), parse_recipe(KINDS["unmatched"](1_000)), INPUTS)
    text = str(caught.value)
    findings = caught.value.findings
    assert len(findings) == 1_000
    assert compared == [f"layers.x{number}" for number in range(SHOWN)]
    assert all("did you mean" in finding.hint for finding in findings[:SHOWN])
    assert text.count("did you mean") == text.count("matches nothing in") == SHOWN
    assert text.endswith(
        "\n... and 980 more: 980 QR301 (rule matches nothing)\n"
        "  `--json` shows all of them, and `findings` of this error has them"
    )
    assert len(text) < 6_000


def test_mistakes_in_a_recipe_are_few_in_a_report_too(compared):
    with pytest.raises(QRecipeError) as caught:
        parse_recipe(MERGED["undefined qconfigs"](1_000))
    assert len(compared) == SHOWN
    assert str(caught.value).count("there is no qconfig") == SHOWN
    assert "more: 80 QR107 (undefined tensor or qconfig)" in str(caught.value)
    assert len(caught.value.findings) == 100


def test_the_command_line_counts_the_rest_and_json_has_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\ndef factory():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, 2)).eval(), torch.randn(1, 2)\n"
    )
    (tmp_path / "many.toml").write_text(KINDS["unmatched"](30))
    shown = run("plan", "many.toml", "--model", "net.py:factory")
    assert shown.exit_code == 1
    assert shown.stderr.count("matches nothing in") == SHOWN
    assert "... and 10 more: 10 QR301" in shown.stderr
    found = json.loads(run("plan", "many.toml", "--model", "net.py:factory", "--json").stdout)
    assert len(found["findings"]) == 30
    (tmp_path / "wrong.toml").write_text(MERGED["undefined qconfigs"](30))
    checked = run("check", "wrong.toml")
    assert checked.stdout.count("there is no qconfig") == SHOWN
    assert "... and 10 more: 10 QR107" in checked.stdout
    assert len(json.loads(run("check", "wrong.toml", "--json").stdout)["findings"]) == 30


def test_a_plan_with_many_warnings_shows_twenty_of_them():
    plan = planned(30, recipe("shadowed", 30))
    assert len(plan.warnings) >= 30
    assert sum(map(str(plan).count, ("has no effect", "QR221 "))) == SHOWN
    assert "`warnings` of the plan has them" in str(plan)
