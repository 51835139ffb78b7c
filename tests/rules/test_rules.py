"""Which rule wins and which contradict each other: on plain data, without torch."""

from __future__ import annotations

import pytest
from rule_cases import (
    GLOBAL,
    INT4,
    INT8,
    NET,
    SITES,
    call,
    covered,
    findings,
    function,
    kind,
    module,
    name,
    only_finding,
    spec,
    structure,
    winners,
)

from qrecipe.errors.findings import ConflictError, error_from
from qrecipe.recipe.recipe import QConfigSpec, parse_recipe
from qrecipe.rules.resolution import resolve

# --- tiers


def test_global_decides_every_site_that_no_other_rule_covers():
    assert winners() == dict.fromkeys(SITES, "")


def test_a_module_type_or_function_beats_global():
    won = winners(kind("torch.nn.Linear", None), function("torch.add", None))
    assert [site for site in SITES if won[site]] == [
        "layer1.0:add",
        "layer1.0:add#1",
        "layer4.0",
        "layer4.1",
    ]


def test_a_name_beats_a_type_and_a_function_even_from_an_outer_module_and_as_a_glob():
    won = winners(name("layer?", None), kind("torch.nn.Conv2d", INT4), function("torch.add", INT4))
    assert {site for site in SITES if won[site] == "layer?"} == {
        site for site in SITES if site.startswith(("layer1.", "layer4."))
    }
    assert won["layer10"] == "torch.nn.Conv2d"


def test_a_container_type_reaches_the_calls_in_its_forward_but_a_function_rule_is_nearer():
    won = winners(kind("models.Block", None), function("torch.add", INT4))
    assert won["layer1.0.conv1"] == "models.Block"
    assert won["layer1.0:add"] == "torch.add"


# --- nearest


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("layer1.0", "layer1"),
        ("layer1.?", "layer1"),
        ("layer1.0.c*1", "layer1.0"),
        ("layer1.0:add", "layer1.0"),
    ],
)
def test_the_rule_on_the_nearest_enclosing_module_wins_whether_exact_or_not(near, far):
    won = winners(name(near, INT4), name(far, None))
    assert near in won.values()
    for site in covered(name(near, INT4)):
        assert won[site] == near


def test_the_nearest_module_of_a_type_rule_wins_over_an_outer_type():
    won = winners(kind("torch.nn.Conv2d", INT4), kind("torch.nn.Sequential", None))
    assert won["layer1.0.conv1"] == "torch.nn.Conv2d"
    assert won["layer1.0.relu"] == "torch.nn.Sequential"
    assert won["layer10"] == "torch.nn.Conv2d"


# --- exact, layers


def test_an_exact_name_beats_a_glob_at_the_same_distance():
    won = winners(name("layer1.0", INT4), name("layer?.0", None))
    assert won["layer1.0.conv1"] == "layer1.0"
    assert won["layer4.0"] == "layer?.0"


def test_an_extending_recipe_beats_an_equal_rule_of_its_base():
    base = name("layer1.0.c*", None, layer="base")
    own = name("layer1.*.conv?", INT4, layer="own", overrides=frozenset({"base"}))
    for rules in ([base, own], [own, base]):
        assert winners(*rules)["layer1.0.conv1"] == "layer1.*.conv?"


def test_a_base_still_wins_where_its_rule_is_exact_or_nearer():
    base = name("layer1.0.conv1", None, layer="base")
    glob = name("layer1.0.conv?", INT4, layer="own", overrides=frozenset({"base"}))
    outer = name("layer1", INT4, layer="own", overrides=frozenset({"base"}))
    won = winners(base, glob, outer)
    assert won["layer1.0.conv1"] == "layer1.0.conv1"
    assert won["layer1.0.conv2"] == "layer1.0.conv?"


def test_two_bases_that_disagree_conflict_unless_the_recipe_that_extends_both_decides():
    left = name("layer4.0", INT4, layer="left")
    right = name("layer4.[0]", None, layer="right")
    glob = name("layer4.?", None, layer="left")
    other = name("layer?.1", INT4, layer="right")
    assert findings(left, right) == ()
    assert only_finding(glob, other).code == "QR304"
    top = name("layer[4].1", INT8, layer="top", overrides=frozenset({"left", "right"}))
    assert winners(glob, other, top)["layer4.1"] == "layer[4].1"


# --- conflicts


def test_equal_rules_that_say_otherwise_are_a_conflict_that_shows_both_places():
    one, two = name("layer4.?", None), name("layer?.0", INT4)
    with pytest.raises(ConflictError) as caught:
        raise error_from(findings(one, two))
    text = str(caught.value)
    assert str(one.location) in text
    assert str(two.location) in text
    assert "layer4.0" in text


def test_equal_rules_that_say_the_same_are_no_conflict_whatever_their_reason_and_expectation():
    one = name("layer4.?", INT8, reason="because", expect=2)
    two = name("layer?.0", QConfigSpec(spec("int8"), spec("uint8")), reason="others", expect=6)
    assert findings(one, two) == ()


def test_a_type_and_a_function_never_meet_on_one_call():
    assert winners(kind("torch.nn.ReLU", None), function("torch.relu", INT4))


def test_the_internal_and_the_public_name_of_a_type_are_one_rule_and_may_conflict():
    finding = only_finding(
        kind("torch.nn.Linear", None), kind("torch.nn.modules.linear.Linear", INT4)
    )
    assert finding.code == "QR304"
    assert "layer4.0" in finding.message


@pytest.mark.parametrize("spelling", ["torch.add", "operator.add", "Tensor.add", "operator.iadd"])
def test_every_spelling_of_a_function_covers_the_family(spelling):
    assert covered(function(spelling)) == ["layer1.0:add", "layer1.0:add#1"]


# --- members


@pytest.mark.parametrize("key", ["bn1", "bn?", "relu", "r*"])
def test_a_name_rule_on_a_member_that_says_otherwise_is_a_conflict(key):
    finding = only_finding(name(key, None))
    assert finding.code == "QR304"
    assert "conv1" in finding.message
    assert key in finding.message


def test_a_glob_on_members_of_many_groups_is_one_conflict_that_lists_them():
    net = structure(
        [module("conv1"), module("bn1")],
        [module("layer10"), module("relu"), module("layer1.0.relu")],
        [module("layer4.0"), module("layer1.0.relu", 1)],
    )
    finding = only_finding(name("{bn1,relu,layer1.0.relu}", None), net=net)
    assert "says float about bn1, relu, layer1.0.relu#1, members of the fused groups " in (
        finding.message
    )
    assert "the fused groups conv1, layer10, layer4.0, which global makes int8" in finding.message
    assert finding.hint.endswith('write the rule for "conv1", "layer10", "layer4.0"')


def test_a_rule_of_a_base_on_a_member_gives_way_to_the_recipe_that_extends_it():
    """An overlay leaves a group float, whatever pattern of its base happens to hit a member."""
    base = name("b*", INT8, layer="base")
    own = name("conv1", None, layer="own", overrides=frozenset({"base"}))
    resolution = resolve(NET, [GLOBAL, base, own])
    assert resolution.findings == ()
    assert resolution.decisions["conv1"].rule is own
    assert base in resolution.decisions["conv1"].shadowed


def test_a_name_rule_on_a_member_that_says_the_same_as_the_group_is_shadowed():
    same = name("bn1", INT8)
    resolution = resolve(NET, [GLOBAL, same])
    assert resolution.findings == ()
    assert resolution.decisions["conv1"].rule is GLOBAL
    assert same in resolution.decisions["conv1"].shadowed
    assert resolution.covered[same] == ("conv1",)


@pytest.mark.parametrize(
    ("rule_on_member", "site"),
    [
        (kind("torch.nn.BatchNorm2d", None), "conv1"),
        (kind("torch.nn.ReLU", None), "layer1.0:add"),
    ],
)
def test_type_rules_on_members_are_shadowed(rule_on_member, site):
    decision = resolve(NET, [GLOBAL, rule_on_member]).decisions[site]
    assert decision.rule is GLOBAL
    assert rule_on_member in decision.shadowed
    assert findings(rule_on_member) == ()


def test_function_rules_on_members_are_shadowed():
    net = structure([call("", "torch.add"), call("", "torch.relu")])
    relu = function("torch.relu", None)
    decision = resolve(net, [GLOBAL, relu]).decisions[":add"]
    assert decision.rule is GLOBAL
    assert decision.shadowed == (relu,)


def test_a_container_rule_on_a_member_alone_is_shadowed():
    # a group can reach across modules: its first member decides
    net = structure([call("layer1.0", "torch.add"), module("layer4.0")])
    container = name("layer4", None)
    resolution = resolve(net, [GLOBAL, container])
    assert resolution.findings == ()
    assert resolution.decisions["layer1.0:add"].rule is GLOBAL
    assert container in resolution.decisions["layer1.0:add"].shadowed
    assert resolution.covered[container] == ("layer1.0:add",)


# a group can reach across modules
ACROSS = structure(
    [call("layer1.0", "torch.add"), module("layer4.0"), call("layer4", "torch.relu")],
    [module("layer4.1")],
)


def contradicted(*rules):
    """What each rule says in vain about later members of the group across modules."""
    resolution = resolve(ACROSS, [GLOBAL, *rules])
    assert resolution.findings == ()
    found = resolution.decisions["layer1.0:add"].contradicted
    return {rule.key: members for rule, members in found.items()}


@pytest.mark.parametrize("key", ["layer4", "l*4"])
def test_a_rule_around_later_members_alone_contradicts_the_group(key):
    assert contradicted(name(key, None)) == {key: ("layer4.0", "layer4:relu")}


def test_a_rule_by_type_or_function_on_a_later_member_contradicts_the_group():
    for shadowed, member in (
        (kind("torch.nn.Linear", None), "layer4.0"),
        (function("torch.relu", None), "layer4:relu"),
    ):
        assert contradicted(shadowed) == {shadowed.key: (member,)}


def test_a_rule_contradicts_a_group_at_the_members_that_it_would_decide():
    outer = name("layer4", None)
    assert contradicted(outer, name("layer4.0", INT8)) == {"layer4": ("layer4:relu",)}
    assert contradicted(name("layer4", INT8), function("torch.relu", None)) == {}
    assert contradicted(outer, function("torch.relu", INT8))["layer4"][-1] == "layer4:relu"


def test_a_rule_contradicts_no_group_that_does_as_it_says_or_that_it_covers_or_that_beats_it():
    assert contradicted(name("layer4", INT8)) == {}
    assert contradicted(name("layer4", None), name("layer1", None)) == {}
    assert contradicted(name("layer[14]", None), name("layer1.0", INT8)) == {}
    by_type = kind("torch.nn.Sequential", None)
    assert contradicted(by_type, function("torch.add", INT4)) == {}  # covers layer1, and so all
    assert contradicted(function("torch.relu", None), name("layer1", INT8)) == {}
    base = name("layer4", None, layer="base")
    own = name("layer1", INT4, layer="own", overrides=frozenset({"base"}))
    assert contradicted(base, own) == {}


def test_one_rule_over_the_whole_group_is_no_conflict():
    assert winners(name("{conv1,bn1,relu}", None))["conv1"] == "{conv1,bn1,relu}"


# --- what a decision says


def test_a_decision_knows_whether_its_rule_names_the_operation_itself():
    def names_operation(a_rule, site):
        decision = resolve(NET, [GLOBAL, a_rule]).decisions[site]
        assert decision.rule is a_rule
        return decision.names_operation

    assert names_operation(name("layer4.0"), "layer4.0")
    assert names_operation(name("layer1.0:add"), "layer1.0:add")
    assert names_operation(kind("torch.nn.Linear"), "layer4.0")
    assert names_operation(function("torch.add"), "layer1.0:add")
    assert not names_operation(name("layer4.?"), "layer4.0")
    assert not names_operation(name("layer4"), "layer4.0")
    assert not names_operation(kind("models.Block"), "layer1.0.conv1")
    assert not resolve(NET, [GLOBAL]).decisions["layer4.0"].names_operation


def test_every_rule_that_covers_a_site_and_does_not_win_is_listed_as_shadowed():
    near, far, a_type = name("layer4.0"), name("layer4", None), kind("torch.nn.Linear", None)
    decision = resolve(NET, [GLOBAL, a_type, far, near]).decisions["layer4.0"]
    assert decision.rule is near
    assert set(decision.shadowed) == {far, a_type, GLOBAL}


# --- inherit: rules as a recipe that extends another resolves them

BASE = """
format = 1
extends = "builtin:x86-static"
[rules.module_name]
"""


def test_inherit_removes_the_inherited_rule_of_the_identical_key_and_no_other(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "base.toml").write_text(
        BASE + '"layer1.*" = "float"\n"layer1.**" = "float"\n"layer4" = "float"\n'
    )
    text = 'format = 1\nextends = "./base.toml"\n[rules.module_name]\n"layer1.*" = "inherit"\n'
    recipe = parse_recipe(text, tmp_path / "own.toml")
    keys = [a_rule.key for a_rule in recipe.rules if a_rule.tier == "module_name"]
    assert sorted(keys) == ["layer1.**", "layer4"]


def test_the_rule_of_the_extending_recipe_overrides_its_base_in_the_resolved_recipe(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "base.toml").write_text(BASE + '"layer4.?" = "float"\n"layer1" = "float"\n')
    text = 'format = 1\nextends = "./base.toml"\n[rules.module_name]\n"layer?.0" = "int8"\n'
    recipe = parse_recipe(text, tmp_path / "own.toml")
    resolution = resolve(NET, recipe.rules)
    assert resolution.findings == ()
    assert resolution.decisions["layer4.0"].rule.key == "layer?.0"
    assert resolution.decisions["layer4.1"].rule.key == "layer4.?"
