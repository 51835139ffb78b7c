import json
import math

import pytest
import torch
import torch.nn.functional as F
from plans import IMAGE, net_of, recipe, sites
from torch import nn

import qrecipe

SPELLINGS = {
    "nn.ReLU6": (lambda self, x: self.clamp(self.conv(x)), nn.ReLU6(), [0.0, 6.0]),
    "nn.Hardtanh": (lambda self, x: self.clamp(self.conv(x)), nn.Hardtanh(-2, 2), [-2.0, 2.0]),
    "relu6": (lambda self, x: F.relu6(self.conv(x)), None, [0.0, 6.0]),
    "hardtanh": (lambda self, x: F.hardtanh(self.conv(x), -1, max_val=3), None, [-1.0, 3.0]),
    "hardtanh as it is": (lambda self, x: F.hardtanh(self.conv(x)), None, [-1.0, 1.0]),
    "clamp": (lambda self, x: torch.clamp(self.conv(x), 0, 4), None, [0.0, 4.0]),
    "method": (lambda self, x: self.conv(x).clamp(min=0.5), None, [0.5, None]),
    "clip": (lambda self, x: torch.clip(self.conv(x), max=4), None, [None, 4.0]),
    "float clamp": (lambda self, x: self.conv(x).clamp_min(0.5), None, [0.5, None]),
    "two limits": (
        lambda self, x: torch.cat([F.relu6(y := self.conv(x)), y.clamp(-1, 3)], 1),
        None,
        [-1.0, 6.0],
    ),
    "one after the other": (lambda self, x: F.relu6(self.conv(x)).clamp(-1, 1), None, [0.0, 1.0]),
    "moved before": (lambda self, x: F.relu6(self.conv(x).flatten(1)), None, [0.0, 6.0]),
    "pooled before": (lambda self, x: F.relu6(F.max_pool2d(self.conv(x), 2)), None, [0.0, 6.0]),
    "crossed limits": (lambda self, x: self.conv(x).clamp(3, 1), None, [1.0, 1.0]),
    "one infinite limit": (lambda self, x: self.conv(x).clamp(0, math.inf), None, [0.0, None]),
    "unfused ReLU": (lambda self, x: F.relu(F.max_pool2d(self.conv(x), 2)), None, [0.0, None]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_site_that_only_a_clamp_reads_is_observed_between_its_limits(name):
    forward, clamp, limits = SPELLINGS[name]
    net = net_of(forward, conv=nn.Conv2d(3, 4, 3), **({"clamp": clamp} if clamp else {}))
    found = sites(qrecipe.plan(net, recipe(), IMAGE))["conv"]
    assert found.clamp == tuple(limits)
    assert "which clamps it" in found.reason or "which clamp it" in found.reason


OTHERS = {
    "another reader": lambda self, x: F.relu6(y := self.conv(x)) + y,
    "the model's output": lambda self, x: (F.relu6(y := self.conv(x)), y),
    "an average before": lambda self, x: F.relu6(F.avg_pool2d(self.conv(x), 2)),
    "limits that are tensors": lambda self, x: torch.clamp(self.conv(x), self.low, self.low + 1),
    "infinite limits": lambda self, x: self.conv(x).clamp(-math.inf, math.inf),
    "no common limit": lambda self, x: torch.cat(
        [(y := self.conv(x)).clamp_min(0), y.clamp_max(4)]
    ),
    "no clamp": lambda self, x: F.leaky_relu(self.conv(x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_site_that_is_read_without_limits_is_observed_as_it_is(name):
    net = net_of(OTHERS[name], conv=nn.Conv2d(3, 4, 3))
    net.register_buffer("low", torch.zeros(1))
    assert sites(qrecipe.plan(net, recipe(), IMAGE))["conv"].clamp is None
    qrecipe.compile(net, recipe(), IMAGE).prepare()(IMAGE)


def test_a_site_that_shares_the_range_of_a_wider_one_does_not_claim_the_clamps():
    def forward(self, x):
        y = self.conv(x)
        return F.relu6(F.max_pool2d(y, 2)), self.other(y)

    net = net_of(forward, conv=nn.Conv2d(3, 4, 3), other=nn.Conv2d(4, 4, 1))
    assert {site.clamp for site in qrecipe.plan(net, recipe(), IMAGE)} == {None}


def test_branches_claim_a_clamp_only_together():
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return F.relu6(torch.cat([a, b], 1)), self.other(b)

    net = net_of(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), other=nn.Conv2d(4, 4, 1))
    assert {site.clamp for site in qrecipe.plan(net, recipe(), IMAGE)} == {None}


def test_a_plan_with_limits_is_read_back_and_an_older_one_has_none():
    net = net_of(lambda self, x: F.relu6(self.conv(x)), conv=nn.Conv2d(3, 4, 3))
    plan = qrecipe.plan(net, recipe(), IMAGE)
    assert qrecipe.Plan.from_json(plan.to_json()) == plan
    older = plan.to_dict()
    for site in older["sites"]:
        del site["clamp"]
    assert qrecipe.Plan.from_json(json.dumps(older))["conv"].clamp is None
