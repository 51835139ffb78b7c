"""Random models under random rules: nothing is wrong, or it says so."""

from __future__ import annotations

import random

import pytest
import torch
from artifacts import MODES
from random_nets import AROUND_LINEAR, RandomNet, batches
from runs import HEAD, exactly, silent
from shares import every

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import UnsupportedError


@pytest.mark.parametrize("phase", ["ptq", "qat"])
@pytest.mark.parametrize("seed", every(20, range(60)))
def test_any_net_with_layers_of_other_modes_passes_the_audit(seed, phase):
    torch.manual_seed(seed)
    model, data = RandomNet(seed, AROUND_LINEAR).eval(), batches(3)
    text = f'{HEAD}phase = "{phase}"\n{MODES}[rules.module_name]\n'
    plan = qrecipe.plan(model, qrecipe.parse_recipe(text), data[0])
    layers = [site.name for site in plan.sites if site.op == "Linear"]
    modes = ("dynamic", "float") if phase == "qat" else ("dynamic", "half", "float")
    chosen = zip(layers, random.Random(seed).choices((*modes, "int8"), k=len(layers)), strict=True)
    rules = "".join(f'"{exactly(name)}" = "{mode}"\n' for name, mode in chosen)
    compiled = qrecipe.compile(model, qrecipe.parse_recipe(f"{text}{rules}"), data[0])
    prepared = compiled.prepare().train(phase == "qat")
    for batch in data:
        prepared(batch)
    compiled.convert(prepared)


@pytest.mark.parametrize("seed", every(9, range(42)))
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
