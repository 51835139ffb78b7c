"""A rule for a type does not mean its subclasses, and that is said."""

from __future__ import annotations

import torch
from torch import nn

import qrecipe


class OwnLinear(nn.Linear):
    pass


def plan_of(model):
    text = (
        'format = 1\nextends = "builtin:x86-static"\n'
        '[rules.module_type]\n"torch.nn.Linear" = "float"'
    )
    return qrecipe.plan(model.eval(), qrecipe.parse_recipe(text), torch.randn(2, 200))


def test_a_rule_that_hits_subclasses_only_says_what_to_write():
    plan = plan_of(nn.Sequential(OwnLinear(200, 100)))
    (finding,) = [finding for finding in plan.warnings if finding.code == "QR209"]
    assert "OwnLinear" in finding.hint
    assert finding.location.line == 4


def test_a_rule_that_hits_its_class_says_nothing():
    plan = plan_of(nn.Sequential(nn.Linear(200, 100), OwnLinear(100, 10)))
    assert "QR209" not in {finding.code for finding in plan.warnings}
