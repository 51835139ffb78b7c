"""The static recipe and variants of it that leave sites float, for tests that execute."""

from __future__ import annotations

import random

import torch

import qrecipe
from qrecipe.measure.turns import run_in_turn

HEAD = 'format = 1\nextends = "builtin:x86-static"\n'
STATIC = qrecipe.parse_recipe(HEAD)


def silent(done, total):
    """A progress callback that shows nothing."""


def hurry(monkeypatch):
    """Measure times in few rounds, for tests that do not look at them."""

    def few(passes, *rounds, **options):
        run_in_turn(passes, 2)

    monkeypatch.setattr("qrecipe.measure.profile.profile.run_in_turn", few)
    monkeypatch.setattr("qrecipe.authoring.fastest.fastest.run_in_turn", few)


def float_at(names):
    rules = "".join(f'"{exactly(name)}" = "float"\n' for name in names)
    return qrecipe.parse_recipe(f"{HEAD}[rules.module_name]\n{rules}")


def exactly(name):
    """The key of a rule for this very call and no later one."""
    return name if "#" in name else f"{name}#0"


def half_of(net, seed):
    """A recipe that leaves a random half of the sites float, each by its exact name."""
    names = [site.name for site in qrecipe.plan(net.model(), STATIC, net.batches(1)[0]).sites]
    return float_at(random.Random(seed).sample(names, len(names) // 2))


def tensors_of(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
