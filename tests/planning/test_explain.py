"""Why a site, a member, an alias or a module is decided as it is."""

from __future__ import annotations

import re

import pytest
from plans import named, plan_of

from qrecipe.errors.findings import PlanError

# --- explain


def test_a_site_is_explained_by_its_rule_its_verdict_and_its_specs():
    text = plan_of("residual", named(layer1="float", layer1__0="int8")).explain("layer1.0.conv1")
    assert re.search(r"Conv2d ?\+ ?BatchNorm2d ?\+ ?ReLU", text)
    assert "quantized" in text
    assert 'module_name "layer1.0"' in text
    assert 'shadowed   module_name "layer1"' in text
    assert "<recipe>:6" in text
    assert "per_channel_minmax" in text


def test_a_member_is_explained_by_its_group():
    text = plan_of("residual").explain("bn1")
    assert "bn1 is a member" in text
    assert "conv1" in text


def test_an_alias_is_explained_under_its_canonical_name():
    text = plan_of("aliased").explain("second")
    assert "second is another name of first" in text
    assert "Linear" in text


def test_a_container_is_explained_by_what_it_holds():
    plan = plan_of("residual")
    text = plan.explain("layer1.0")
    assert "3 sites" in text
    assert "layer1.0:add" in text
    assert "layer1.1" not in text
    assert "11 sites" in plan.explain("")


def test_every_call_of_a_name_can_be_explained_with_or_without_its_number():
    plan = plan_of("binary")
    first, second = plan.explain(":add#0"), plan.explain(":add#1")
    assert "alpha" in second
    assert "alpha" not in first
    assert plan.explain(":add").startswith(f"{first}\n\n{second}")


def test_a_module_that_is_never_called_is_explained_as_such():
    assert "nothing" in plan_of("aliased").explain("unused")


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(PlanError) as caught:
        plan_of("residual").explain("layer1.0.convl")
    (finding,) = caught.value.findings
    assert finding.code == "QR310"
    assert "layer1.0.conv" in finding.hint
