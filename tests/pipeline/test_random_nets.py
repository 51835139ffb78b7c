"""Random models under random rules: nothing is wrong, or it says so."""

from __future__ import annotations

import random

import pytest
import torch
from random_nets import RandomNet, batches
from runs import HEAD, exactly, silent
from shares import every

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import UnsupportedError


@pytest.mark.parametrize("seed", every(3, range(42)))
def test_any_net_with_any_sites_left_float_passes_the_audit(seed):
    backend = ("x86", "fbgemm", "onednn", "qnnpack")[seed % 4]
    torch.manual_seed(seed)
    model, data = RandomNet(seed).eval(), batches()
    text = f'{HEAD}backend = "{backend}"\n'
    try:
        plan = qrecipe.plan(model, qrecipe.parse_recipe(text), data[0])
    except UnsupportedError as error:
        refused = error.plan
    else:
        refused = None
    if refused is not None:
        # a net of nothing but operations without kernels, and some that follow their producers
        assert all(site.verdict == "float" for site in refused.sites)
        return
    chosen = random.Random(seed).sample(plan.sites, len(plan.sites) // 3)
    rules = "".join(f'"{exactly(site.name)}" = "float"\n' for site in chosen)
    recipe = qrecipe.parse_recipe(f"{text}[rules.module_name]\n{rules}")
    converted = qrecipe.quantize(model, recipe, data, progress=silent)
    for expected, actual in zip(model(data[0]), converted(data[0]), strict=True):
        assert sqnr_db(expected, actual) > 15
