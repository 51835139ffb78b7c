"""Why a site, a member, an alias or a module is decided as it is."""

from __future__ import annotations

import re

import pytest
from plans import named, net_of, plan_of, recipe
from torch import nn, zeros

import qrecipe
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


def test_what_is_outside_the_roots_is_said_to_be_and_layers_with_weights_are_listed():
    parts = {"inside": nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "outside": nn.Linear(6, 6)}
    net = net_of(lambda self, x: self.act(self.outside(self.inside(x))), **parts, act=nn.ReLU())
    plan = qrecipe.plan(net, recipe('fx.roots = ["inside"]'), zeros(2, 6))
    assert plan.explain("outside") == "outside is outside fx.roots, and runs as it is"
    assert plan.explain("inside").startswith("inside has 1 site\n")
    assert plan.explain("").startswith("the model has 1 site\n")
    assert "Outside fx.roots, and so float: outside." in str(plan)
    with pytest.raises(PlanError, match="QR310"):
        plan.explain("outsid")
    assert "Outside" not in str(plan_of("residual"))


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(PlanError) as caught:
        plan_of("residual").explain("layer1.0.convl")
    (finding,) = caught.value.findings
    assert finding.code == "QR310"
    assert "layer1.0.conv" in finding.hint
