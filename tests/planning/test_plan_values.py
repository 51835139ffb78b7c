"""A plan as a collection of sites, and as plain values that are read back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import MappingProxyType
from typing import get_args

import pytest
import torch
from plans import named, plan_of
from torch import nn

import qrecipe
from qrecipe.errors.findings import Finding, Location, PlanError
from qrecipe.planning.plan import Engine, Executor, Plan
from qrecipe.recipe.recipe import Ingredient
from qrecipe.recipe.references import Publisher


def rich():
    """A plan with all that a plan can hold."""
    plan = plan_of("residual", named(layer1="float", layer1__0="int8"))
    here = Location("net.toml", 3, 5, 9, "int8 = 1")
    finding = Finding("QR206", "text", here, "hint", (("against", here),), ("a note",))
    published = Ingredient("acme:cnn", "0" * 64, Publisher("acme", "1.0"))
    site = replace(plan.sites[0], engine="onednn", reason="it is faster")
    return replace(
        plan,
        sites=(site, *plan.sites[1:]),
        warnings=(finding, Finding("QR208", "small")),
        findings=(Finding("QR301", "nothing", here),),
        ingredients=(*plan.ingredients, published),
        needs_vnni=True,
    )


@pytest.fixture(scope="module")
def plan():
    return rich()


# --- to values and back


def test_a_plan_read_back_from_its_json_equals_it(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.sites == plan.sites
    assert again.rules == plan.rules
    assert (again.findings, again.warnings) == (plan.findings, plan.warnings)
    assert again.ingredients == plan.ingredients
    assert again.needs_vnni
    assert again.to_json() == plan.to_json()


def test_a_plan_read_back_says_the_same(plan):
    again = Plan.from_json(plan.to_json())
    assert str(again) == str(plan)
    assert repr(again) == repr(plan)
    for name in ("bn1", "layer1.0", ""):
        assert again.explain(name) == plan.explain(name)


def test_values_are_plain_and_read_back_alike(plan):
    values = plan.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Plan.from_dict(values) == plan


@pytest.mark.parametrize(
    ("net", "recipe"),
    [
        ("squeeze_excite", "builtin:x86-static-histogram"),
        ("mlp", "builtin:x86-dynamic"),
        ("aliased", "builtin:x86-vnni-static"),
    ],
)
def test_plans_of_shipped_recipes_are_read_back(net, recipe):
    plan = plan_of(net, recipe)
    assert Plan.from_json(plan.to_json()) == plan


def test_arrays_among_the_arguments_of_an_observer_are_read_back(plan):
    spec = plan["conv1"].qconfig.activation
    observer = type(spec.observer)(name="custom", edges=(1, 2), options={"of": ("a", "b")})
    qconfig = replace(
        plan["conv1"].qconfig, activation=spec.model_copy(update={"observer": observer})
    )
    changed = replace(plan, sites=(replace(plan["conv1"], qconfig=qconfig),))
    values = changed.to_dict()
    assert values["sites"][0]["qconfig"]["activation"]["observer"]["edges"] == [1, 2]
    assert Plan.from_dict(values) == changed


@pytest.mark.parametrize("executor", get_args(Executor))
@pytest.mark.parametrize("engine", [None, *get_args(Engine)])
def test_every_executor_and_every_engine_is_read_back(plan, executor, engine):
    site = replace(plan.sites[0], engine=engine)
    changed = replace(plan, executor=executor, sites=(site,))
    assert Plan.from_json(changed.to_json()) == changed


def test_what_json_does_not_hold_is_not_invented(plan):
    again = Plan.from_json(plan.to_json())
    assert again.structure.operations == ()
    assert again.saturating == ()
    assert str(again.rules[0].location) == str(plan.rules[0].location)
    assert plan.rules[0].location.source
    assert not again.rules[0].location.source


def test_a_plan_is_read_without_torch(plan):
    code = (
        "import sys; from qrecipe.planning.plan import Plan; "
        "print(len(Plan.from_json(sys.stdin.read())), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=plan.to_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(len(plan)), "False"]


# --- texts of somebody else


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "null", "1", '"plan"', "\0", "[" * 100_000, "1" * 10_000]
)
def test_a_text_that_is_no_plan_is_a_finding(text):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert caught.value.findings[0].code == "QR315"


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("sites"),
        lambda plan: plan.update(sites={}),
        lambda plan: plan.update(sites=[1]),
        lambda plan: plan.update(backend="x87"),
        lambda plan: plan.update(boundaries="2"),
        lambda plan: plan.update(needs_vnni=1),
        lambda plan: plan.update(executor="jit"),
        lambda plan: plan.update(is_for_export=True),
        lambda plan: plan.update(sites=plan["sites"] * 2),
        lambda plan: plan["sites"][0].update(members="conv1"),
        lambda plan: plan["sites"][0].update(mode=None),
        lambda plan: plan["sites"][0].update(engine="cuda"),
        lambda plan: plan["sites"][0].update(rule=None),
        lambda plan: plan["sites"][0]["rule"].update(location="nowhere"),
        lambda plan: plan["sites"][0]["rule"].update(location=3),
        lambda plan: plan["sites"][0]["rule"].update(tier="module"),
        lambda plan: plan["sites"][0]["qconfig"]["weight"].update(dtype="int3"),
        lambda plan: plan["sites"][0]["qconfig"]["weight"].update(more=1),
        lambda plan: plan["rules"][0].update(verdict="won"),
        lambda plan: plan["ingredients"][-1].update(version=None),
        lambda plan: plan["warnings"][0].update(code="QR999"),
    ],
)
def test_values_that_no_plan_has_are_a_finding(plan, change):
    values = plan.to_dict()
    change(values)
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(values)
    assert caught.value.findings[0].code == "QR315"


@pytest.mark.parametrize("column", [-(10**12), 0, 10**12])
def test_a_location_outside_its_line_is_shown_without_harm(plan, column):
    values = plan.to_dict()
    values["warnings"][0]["location"]["column"] = column
    assert len(str(Plan.from_dict(values))) < len(str(plan)) + 100


def test_the_finding_says_where_the_text_is_at_fault(plan):
    values = plan.to_dict()
    values["sites"][1]["verdict"] = "halved"
    with pytest.raises(PlanError, match=r"sites\.1\.verdict: Input should be 'quantized'"):
        Plan.from_dict(values)


def test_values_that_json_does_not_have_are_a_finding(plan):
    with pytest.raises(PlanError, match="QR315"):
        Plan.from_dict({**plan.to_dict(), "backend": torch})


# --- a collection of sites


def test_a_plan_has_a_length_and_gives_its_sites_in_order(plan):
    assert len(plan) == len(plan.sites)
    assert tuple(plan) == plan.sites


def test_a_site_is_found_by_its_name_its_members_and_its_other_names():
    plan = plan_of("residual")
    assert plan["conv1"] is plan.sites[0]
    assert plan["bn1"] is plan.sites[0]
    assert plan_of("aliased")["second"].name == "first"


def test_a_plan_contains_its_sites_and_their_names(plan):
    assert "conv1" in plan
    assert "bn1" in plan
    assert plan.sites[0] in plan
    assert "conv11" not in plan
    assert 0 not in plan


def test_a_name_without_a_site_is_a_key_error_with_the_nearest_name(plan):
    with pytest.raises(KeyError) as caught:
        plan["conv11"]
    assert isinstance(caught.value, PlanError)
    assert caught.value.findings[0].code == "QR310"
    assert 'did you mean "conv1"' in str(caught.value)


def test_a_module_around_sites_is_no_site(plan):
    with pytest.raises(KeyError, match='no site or member "layer1"'):
        plan["layer1"]


def test_an_index_is_no_name(plan):
    with pytest.raises(KeyError, match="QR310"):
        plan[0]


# --- as a value


def test_a_plan_has_a_hash_and_equal_plans_have_the_same():
    plan, again = plan_of("residual"), plan_of("residual")
    assert {plan: 1}[again] == 1
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)
    assert plan != plan_of("residual", named(conv1="float"))


def test_the_repr_of_a_plan_is_its_first_line(plan):
    assert repr(plan) == f"<Plan: {str(plan).splitlines()[0]}>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values["sites"][0].pop("engine"), "sites has keys or values"),
        (lambda values: values["sites"][0].update(engin=None), "sites has keys or values"),
        (lambda values: values.update(notes=[]), "notes has keys or values"),
        (lambda values: values.update(boundaries=-7), "boundaries is negative"),
        (lambda values: values.update(recipe=object()), "object is not a plain value"),
    ],
)
def test_nothing_that_to_dict_does_not_write_is_read(change, said):
    values = qrecipe.plan(
        nn.Sequential(nn.Linear(2, 2)).eval(), "builtin:x86-dynamic", torch.ones(1, 2)
    ).to_dict()
    change(values)
    with pytest.raises(qrecipe.PlanError, match=f"QR315 .*{said}"):
        qrecipe.Plan.from_dict(values)


def test_any_mapping_is_read_and_a_plan_without_sites_is_true():
    plan = qrecipe.plan(
        nn.Sequential(nn.Linear(2, 2)).eval(), "builtin:x86-dynamic", torch.ones(1, 2)
    )
    assert qrecipe.Plan.from_dict(MappingProxyType(plan.to_dict())) == plan
    assert replace(plan, sites=())


def test_control_characters_of_a_recipe_do_not_reach_the_terminal():
    text = 'format = 1\nextends = "builtin:x86-dynamic"\n[rules.module_name]\n'
    text += '"0" = { qconfig = "float", reason = "a\\u001b[31mb" }\n'
    plan = qrecipe.plan(
        nn.Sequential(nn.Linear(2, 2)).eval(), qrecipe.parse_recipe(text), torch.ones(1, 2)
    )
    assert "\x1b" in plan.sites[0].rule.reason
    assert "\x1b" not in str(plan)
    assert "\x1b" not in plan.explain("")
