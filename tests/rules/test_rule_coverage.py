"""What a rule covers, and what is wrong where it covers too little."""

from __future__ import annotations

import pytest
from rule_cases import (
    INT4,
    INT8,
    SITES,
    covered,
    findings,
    function,
    kind,
    name,
    only_finding,
)

from qrecipe.errors.findings import PlanError, UnmatchedRuleError, error_from

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


def test_a_single_site_is_counted_as_one():
    message = only_finding(name("layer1.0.conv1", expect=2)).message
    assert message.startswith('module_name "layer1.0.conv1" covers 1 site, not 2: ')


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


def test_a_glob_that_matches_nothing_names_the_nearest_glob_that_matches():
    assert only_finding(name("layerl.*.conv1")).hint == 'did you mean "layer1.*.conv1"?'
    assert only_finding(name("layers4.[01]")).hint == 'did you mean "layer4.[01]"?'
    assert "[789]" not in only_finding(name("layer4.[789]")).hint


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
