"""Rankings of sites, and what they are compared with."""

from __future__ import annotations

import functools

import torch
from nets import NETS
from runs import HEAD, silent

import qrecipe
from qrecipe.audit.sqnr import Totals

FEW = '[lint]\nignore = ["QR201", "QR203", "QR206", "QR210"]\n'
STATIC = qrecipe.parse_recipe(HEAD + FEW)


def ranked(model, batches, recipe=STATIC, **options):
    return qrecipe.sensitivity(model, recipe, batches, progress=silent, **options)


@functools.cache
def ranking_of(name):
    net = NETS[name]
    return ranked(net.model(), net.batches(3))


def sqnr_db(model, converted, batches, forward=lambda net, batch: net(batch)):
    totals = Totals()
    with torch.no_grad():
        for batch in batches:
            totals.add(forward(model, batch), forward(converted, batch))
    return totals.fidelity().sqnr_db


def as_dict(ranking):
    return {site.name: site.sqnr_db for site in ranking.sites}


def float_rules(recipe):
    return [rule for rule in recipe.rules if rule.tier == "module_name" and rule.qconfig is None]
