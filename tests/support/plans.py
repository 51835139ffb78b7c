"""Recipes and plans in one line, for tests."""

from __future__ import annotations

import torch
from nets import NETS
from torch import nn

import qrecipe

IMAGE = torch.zeros(1, 3, 8, 8)
ROWS = torch.zeros(2, 6)


def recipe(rules="", *, base="builtin:x86-static", head=""):
    return qrecipe.parse_recipe(f'format = 1\nextends = "{base}"\n{head}\n{rules}\n')


def named(**rules):
    """A recipe of module_name rules, ``__`` for a dot."""
    lines = "".join(f'"{key.replace("__", ".")}" = "{value}"\n' for key, value in rules.items())
    return recipe(f"[rules.module_name]\n{lines}")


def net_of(forward, **modules):
    net = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(net, name, module)
    return net.eval()


def plan_of(name, a_recipe=None):
    net = NETS[name]
    return qrecipe.plan(net.model(), a_recipe or recipe(), net.batches(1)[0])


def sites(plan):
    return {site.name: site for site in plan.sites}


def verdicts(plan):
    return {site.name: site.verdict for site in plan.sites}


def rule_verdicts(plan):
    return {verdict.rule.key: verdict.verdict for verdict in plan.rules}


INT8_ACTIVATION = """
[tensor.signed]
observer = "minmax"
dtype = "int8"
qscheme = "per_tensor_symmetric"
[qconfig.signed]
weight = "weight"
activation = "signed"
"""
