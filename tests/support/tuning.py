"""A net whose errors cancel, and what the tests of the search have in common."""

from __future__ import annotations

import copy

import torch
from plans import net_of
from runs import silent
from torch import nn

import qrecipe
from qrecipe.authoring.fastest.costs import Costs, SitePrice

FEW = '[lint]\nignore = ["QR201", "QR203", "QR206", "QR210"]\n'


def base(text=""):
    return qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-static"\n{text}{FEW}')


def closeness(model, batches):
    """An evaluation: minus the mean squared error against the float model, 0 for itself."""
    with torch.no_grad():
        expected = [model(batch) for batch in batches]

    def evaluate(candidate):
        with torch.no_grad():
            errors = [
                (candidate(b) - e).square().mean() for b, e in zip(batches, expected, strict=True)
            ]
        return -float(sum(errors) / len(errors))

    return evaluate


def tuned(model, batches, evaluate, recipe=None, **options):
    return qrecipe.tune(
        model, base() if recipe is None else recipe, batches, evaluate, progress=silent, **options
    )


def cancelling():
    """Two branches with equal errors, of which the difference is left, and a third of its own.

    Each branch alone is far more sensitive than the third, and one of them left float lays bare
    the error of the other.
    """
    torch.manual_seed(0)
    a, c = nn.Linear(16, 16), nn.Linear(16, 16)
    nn.init.normal_(a.weight, std=4.0)
    model = net_of(
        lambda self, x: (self.a(x) - self.b(x)) - self.c(x), a=a, b=copy.deepcopy(a), c=c
    )
    return model, [torch.randn(32, 16) for _ in range(3)]


def in_float_time(**shares):
    """Costs of sites that take no time in int8."""
    return Costs(tuple(SitePrice(name, share, share, 0.0) for name, share in shares.items()), ())


def alike(bench, levers):
    """In place of a profile: each site takes as long as any other, and no time in int8.

    Whether sites as small as those of test nets are faster in int8 is noise.
    """
    return in_float_time(**dict.fromkeys(bench.members, 1.0))


def full_loss(model, batches, evaluate):
    return -evaluate(qrecipe.quantize(model, base(), batches, progress=silent))
