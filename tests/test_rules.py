"""Which rule wins, what a rule covers, and what is wrong with it: on plain data, without torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipe.errors import ConflictError, Location, PlanError, UnmatchedRuleError, error_from
from qrecipe.operations import Member, ModelStructure, Operation, enclosing
from qrecipe.recipe import QConfigSpec, Rule, parse_recipe
from qrecipe.rules import resolve
from qrecipe.schema import TensorSpec
from qrecipe.signatures import function_family


def spec(dtype, **keys):
    return TensorSpec.model_validate({"observer": "minmax", "dtype": dtype, **keys})


INT8 = QConfigSpec(spec("int8"), spec("uint8"))
INT4 = QConfigSpec(spec("int4"), spec("uint8"))

CLASSES = {
    "": "models.ResNet",
    "conv1": "torch.nn.modules.conv.Conv2d",
    "bn1": "torch.nn.modules.batchnorm.BatchNorm2d",
    "relu": "torch.nn.modules.activation.ReLU",
    "layer1": "torch.nn.modules.container.Sequential",
    "layer1.0": "models.Block",
    "layer1.0.conv1": "torch.nn.modules.conv.Conv2d",
    "layer1.0.conv2": "torch.nn.modules.conv.Conv2d",
    "layer1.0.relu": "torch.nn.modules.activation.ReLU",
    "layer10": "torch.nn.modules.conv.Conv2d",
    "layer4": "torch.nn.modules.container.Sequential",
    "layer4.0": "torch.nn.modules.linear.Linear",
    "layer4.1": "torch.nn.modules.linear.Linear",
    "unused": "torch.nn.modules.linear.Linear",
}
PUBLIC = {
    name: frozenset({name, f"torch.nn.{name.rpartition('.')[2]}"})
    for name in CLASSES.values()
    if name.startswith("torch.")
}


def module(path, call=0):
    return Member(
        name=f"{path}#{call}" if call else path,
        op=CLASSES[path].rpartition(".")[2],
        module=path,
        types=PUBLIC[CLASSES[path]],
        functions=frozenset(),
        scopes=enclosing(path),
    )


def call(path, function, number=0):
    family = function_family(function)
    return Member(
        name=f"{path}:{family}" + (f"#{number}" if number else ""),
        op=family,
        module=None,
        types=frozenset(),
        functions=frozenset({family, function}),
        scopes=enclosing(path),
    )


def structure(*groups, aliases=()):
    return ModelStructure(
        operations=tuple(Operation(tuple(group), "observed", ()) for group in groups),
        modules={path: PUBLIC.get(name, frozenset({name})) for path, name in CLASSES.items()},
        aliases=dict(aliases),
    )


NET = structure(
    [module("conv1"), module("bn1"), module("relu")],
    [module("layer1.0.conv1")],
    [module("layer1.0.relu")],
    [module("layer1.0.conv2")],
    [call("layer1.0", "operator.add"), module("layer1.0.relu", 1)],
    [call("layer1.0", "torch.add", 1)],
    [module("layer10")],
    [module("layer4.0")],
    [module("layer4.1")],
    [call("", "torch.flatten")],
    aliases={"first": "conv1", "layer4.2": "layer4.1"},
)
SITES = [operation.name for operation in NET.operations]


def rule(tier, key="", qconfig=INT8, **changes):
    """A rule; each key has a line of its own, so that locations tell rules apart."""
    label = {id(INT8): "int8", id(INT4): "int4", id(None): "float"}.get(id(qconfig), "inline")
    line = sum(map(ord, tier + key)) % 997 + 1
    made = Rule(
        tier=tier,
        key=key,
        qconfig=qconfig,
        label=label,
        reason=None,
        expect=None,
        optional=False,
        location=Location("recipe.toml", line, 1, 5, f'"{key}" = "{label}"'),
        layer="recipe.toml",
        overrides=frozenset(),
    )
    return replace(made, **changes)


def name(key, qconfig=INT8, **changes):
    return rule("module_name", key, qconfig, **changes)


def kind(key, qconfig=INT8, **changes):
    return rule("module_type", key, qconfig, **changes)


def function(key, qconfig=INT8, **changes):
    return rule("function", key, qconfig, **changes)


GLOBAL = rule("global")


def winners(*rules, net=NET):
    """The key of the rule that decides each site; there must be nothing wrong."""
    resolution = resolve(net, [GLOBAL, *rules])
    assert resolution.findings == ()
    return {site: decision.rule.key for site, decision in resolution.decisions.items()}


def covered(a_rule, net=NET):
    return list(resolve(net, [GLOBAL, a_rule]).covered[a_rule])


def findings(*rules, net=NET):
    return resolve(net, [GLOBAL, *rules]).findings


def only_finding(*rules, net=NET):
    (finding,) = findings(*rules, net=net)
    return finding


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


def test_one_rule_over_the_whole_group_is_no_conflict():
    assert winners(name("{conv1,bn1,relu}", None))["conv1"] == "{conv1,bn1,relu}"


# --- coverage and names


@pytest.mark.parametrize(
    ("key", "sites"),
    [
        ("layer1", SITES[1:6]),
        ("layer1.0", SITES[1:6]),
        ("layer1.**", SITES[1:6]),
        ("layer4.**", ["layer4.0", "layer4.1"]),
        ("layer4.*", ["layer4.0", "layer4.1"]),
        ("layer4.[01]", ["layer4.0", "layer4.1"]),
        ("layer1.0.conv[12]", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("layer1.0.{conv1,relu}", ["layer1.0.conv1", "layer1.0.relu", "layer1.0:add"]),
        ("**.conv1", ["conv1", "layer1.0.conv1"]),
        ("layer1.0:add", ["layer1.0:add", "layer1.0:add#1"]),
        ("layer1.0:add#0", ["layer1.0:add"]),
        ("layer1.0:add#1", ["layer1.0:add#1"]),
        ("layer1.0:*", ["layer1.0:add", "layer1.0:add#1"]),
        ("**:add", ["layer1.0:add", "layer1.0:add#1"]),
        ("layer1.0.relu", ["layer1.0.relu", "layer1.0:add"]),
        ("layer1.0.relu#0", ["layer1.0.relu"]),
        ("layer1.0.relu#1", ["layer1.0:add"]),
        (":flatten", [":flatten"]),
        (":flatten#0", [":flatten"]),
        ("first", ["conv1"]),
        ("layer4.2", ["layer4.1"]),
        ("conv1", ["conv1"]),
    ],
)
def test_a_name_covers_what_it_matches_and_everything_inside_it(key, sites):
    assert covered(name(key)) == sites


@pytest.mark.parametrize("key", ["layer", "conv", "onv1", "layer1.conv1", "layer1.0.conv", "add"])
def test_a_name_matches_whole_names_only(key):
    finding = only_finding(name(key, None))
    assert finding.code == "QR301"
    assert f'"{key}"' in finding.message


def test_layer1_does_not_cover_layer10():
    assert "layer10" not in covered(name("layer1"))
    assert covered(name("layer10")) == ["layer10"]


def test_an_alias_and_its_canonical_name_are_equally_exact():
    finding = only_finding(name("first", None), name("conv1", INT4))
    assert finding.code == "QR304"


def test_coverage_counts_sites_that_another_rule_wins_and_a_group_once():
    everything = name("{conv1,bn1,relu}", None, expect=1)
    container = name("layer1", INT8, expect=5)
    inner = name("layer1.0.conv1", INT8, expect=1)
    assert findings(everything, container, inner) == ()


# --- expect, optional, unmatched, unused


@pytest.mark.parametrize("expect", [1, 3])
def test_an_expectation_that_is_not_met_says_how_many_sites_are_covered(expect):
    finding = only_finding(name("layer4.?", expect=expect))
    assert finding.code == "QR302"
    assert "covers 2 sites" in finding.message
    assert f"not {expect}" in finding.message
    assert "expect = 2" in finding.hint


def test_an_expectation_holds_for_types_and_functions_too():
    assert findings(kind("torch.nn.Linear", expect=2), function("torch.add", expect=2)) == ()
    assert only_finding(kind("torch.nn.Linear", expect=3)).code == "QR302"
    assert only_finding(kind("torch.nn.LSTM", expect=3)).code in ("QR301", "QR302")


def test_an_expectation_of_none_is_met_by_none():
    assert findings(kind("torch.nn.LSTM", expect=0)) == ()
    assert only_finding(kind("torch.nn.Linear", expect=0)).code == "QR302"


def test_a_name_rule_that_matches_nothing_names_the_nearest_real_names():
    finding = only_finding(name("layer1.0.convl"))
    assert finding.code == "QR301"
    assert finding.location == name("layer1.0.convl").location
    assert "layer1.0.conv1" in finding.hint


def test_an_optional_rule_may_match_nothing():
    assert findings(name("nothing", optional=True), kind("other.Type", optional=True)) == ()


def test_an_optional_rule_that_matches_must_still_keep_its_expectation():
    assert only_finding(name("layer4.?", optional=True, expect=3)).code == "QR302"
    assert findings(name("nothing", optional=True, expect=3)) == ()


def test_a_type_or_function_that_torch_knows_may_be_unused_and_no_other():
    assert findings(kind("torch.nn.LSTM"), function("torch.matmul")) == ()
    missing = only_finding(kind("mypkg.layers.Attention"))
    assert missing.code == "QR301"


def test_a_rule_on_modules_that_are_never_called_says_so():
    finding = only_finding(name("unused", None))
    assert finding.code == "QR301"
    assert "nothing is called" in finding.message


def test_every_unmatched_rule_and_broken_expectation_comes_in_one_report():
    found = findings(
        name("convl"), name("layer9"), name("layer4.?", expect=7), kind("my.Own", None)
    )
    assert sorted(finding.code for finding in found) == ["QR301", "QR301", "QR301", "QR302"]
    assert isinstance(error_from(found), UnmatchedRuleError)
    mixed = [*found, *findings(name("bn1", None))]
    assert type(error_from(mixed)) is PlanError


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


# --- properties

KEYS = st.sampled_from(
    [
        "conv1",
        "bn1",
        "conv?",
        "layer1",
        "layer1.0",
        "layer1.*",
        "layer1.**",
        "layer1.0.conv1",
        "layer1.0.conv[12]",
        "layer1.0.*",
        "layer1.0:add",
        "layer1.0:add#1",
        "layer1.0.relu",
        "layer1.0.relu#1",
        "layer?",
        "layer4.?",
        "layer?.0",
        "**.conv1",
        "first",
        "layer4.2",
        ":flatten",
        "nothing",
    ]
)
VALUES = st.sampled_from([INT8, INT4, None])
NAME_RULES = st.dictionaries(KEYS, VALUES, max_size=7).map(
    lambda table: [name(key, value) for key, value in table.items()]
)
TYPE_RULES = st.dictionaries(
    st.sampled_from(["torch.nn.Conv2d", "torch.nn.ReLU", "models.Block", "torch.nn.Sequential"]),
    VALUES,
    max_size=3,
).map(lambda table: [kind(key, value) for key, value in table.items()])
RULES = st.tuples(NAME_RULES, TYPE_RULES).map(lambda both: [GLOBAL, *both[0], *both[1]])


@given(RULES, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_keys_never_matters(rules, random):
    shuffled = random.sample(rules, len(rules))
    one, two = resolve(NET, rules), resolve(NET, shuffled)
    assert one.covered == two.covered
    assert {f.code for f in one.findings} == {f.code for f in two.findings}
    for site, decision in one.decisions.items():
        assert decision.rule == two.decisions[site].rule
        assert set(decision.shadowed) == set(two.decisions[site].shadowed)


@given(RULES)
@settings(max_examples=100, deadline=None)
def test_every_site_is_decided_once_and_by_a_rule_that_covers_it(rules):
    resolution = resolve(NET, rules)
    assert list(resolution.decisions) == SITES
    for site, decision in resolution.decisions.items():
        assert site in resolution.covered[decision.rule]
        assert decision.rule not in decision.shadowed
    for a_rule, sites in resolution.covered.items():
        assert len(sites) == len(set(sites))
        for site in sites:
            decision = resolution.decisions[site]
            assert a_rule is decision.rule or a_rule in decision.shadowed


@given(RULES)
@settings(max_examples=100, deadline=None)
def test_the_winner_follows_the_four_steps_of_precedence(rules):
    """An oracle that is as plain as the text: one comparison a step, on the first member."""
    resolution = resolve(NET, rules)
    if any(finding.code == "QR304" for finding in resolution.findings):
        return
    for operation in NET.operations:
        ranked = [
            (step, a_rule) for a_rule in rules if (step := _steps(a_rule, operation.members[0]))
        ]
        best = min(step for step, _ in ranked)
        top = [a_rule.qconfig for step, a_rule in ranked if step == best]
        assert resolution.decisions[operation.name].rule.qconfig in top
        assert len(set(top)) == 1


def _steps(a_rule, member):
    """(tier, distance, glob) or None: whom the key matches, from the call outwards."""
    if a_rule.tier == "global":
        return (2, 0, 0)
    key = a_rule.key.removesuffix(".**")
    call_name = member.name if "#" in member.name else f"{member.name}#0"
    own = {call_name, call_name.partition("#")[0]}
    aliases = {path: alias for alias, path in NET.aliases.items()}
    chain = [own, *({path} for path in member.scopes if path not in own)]
    for distance, paths in enumerate(chain):
        paths = paths | {aliases[path] for path in paths if path in aliases}
        if a_rule.tier == "module_type":
            hit = any(key in NET.modules.get(path, ()) for path in paths)
        else:
            hit = any(_matches(key, path) for path in paths if path)
        if hit:
            is_glob = a_rule.tier == "module_name" and any(c in key for c in "*?[")
            return (0 if a_rule.tier == "module_name" else 1, distance, is_glob)
    return None


def _matches(key, path):
    import re

    pattern = re.escape(key).replace(r"\*\*\.", r"(?:.*\.)?").replace(r"\*\*", r"[^:#]*")
    pattern = pattern.replace(r"\*", r"[^.:#]*").replace(r"\?", r"[^.:#]")
    pattern = pattern.replace(r"\[12\]", "[12]")
    return re.fullmatch(pattern, path) is not None


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
