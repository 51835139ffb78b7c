"""The corpus once more, dynamic and in training: the model is what the plan says.

Half of the toy nets always, each in one mode and with one share; torchvision's and the other runs
with ``-m slow``.
"""

from __future__ import annotations

import zlib
from itertools import product

import pytest
import torch
from corpus import TORCHVISION, missing
from differential import (
    execute,
    forget_models,
    half_float,
    outputs,
    snapshot,
    wrong_classes,
    wrongly_assigned,
)
from nets import NETS

import qrecipe
from qrecipe.execution.fx.structure import realised_sites

MODES = {
    "dynamic": ("builtin:x86-dynamic", ""),
    "qat": ("builtin:x86-static", 'phase = "qat"\n'),
}
SHARES = ("all", "half")
TURNS = ("qat", "dynamic")
"""The modes of the toy nets: recurrent ones, and those that are not trained, have odd numbers."""
BATCHES = 2

UNTRAINABLE = {"shared_conv_two_norms", "in_place"}
"""The first is refused (QR312); the other overwrites what its own gradients need, in float too."""


def _runs():
    for name, mode, share in product(TORCHVISION, MODES, SHARES):
        missed = pytest.mark.skipif(missing() is not None, reason=str(missing()))
        marks = [missed, pytest.mark.slow]
        yield pytest.param(
            (TORCHVISION, name, mode, share), id=f"{name}-{mode}-{share}", marks=marks
        )
    for (at, name), mode, share in product(enumerate(NETS), MODES, SHARES):
        if not (mode == "qat" and name in UNTRAINABLE):
            turn = TURNS[at % 2], SHARES[at // 4 % 2]
            marks = [] if at % 4 < 2 and (mode, share) == turn else [pytest.mark.slow]
            yield pytest.param((NETS, name, mode, share), id=f"{name}-{mode}-{share}", marks=marks)


@pytest.fixture(params=_runs(), scope="module")
def case(request):
    """The run, and what the caller saw of the model before it."""
    kind, name, mode, share = request.param
    if kind is TORCHVISION:
        forget_models()
    net = kind[name]
    model, batches = net.model(), net.batches(BATCHES)
    before = snapshot(model)
    base, own = MODES[mode]
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{base}"\n{own}')
    if share == "half":
        names = [site.name for site in qrecipe.plan(model, recipe, batches[0]).sites]
        recipe = half_float(names, base, zlib.crc32(f"{name} {mode}".encode()), own)
    return execute(model, batches, recipe), before


def test_fx_assigned_the_very_qconfigs_of_the_plan(case):
    run, _ = case
    assert wrongly_assigned(run) == {}


def test_every_site_became_what_the_plan_says(case):
    run, _ = case
    realised = realised_sites(run.converted)
    became = {name: realised[name].became if name in realised else None for name in run.sites}
    assert became == {site.name: site.mode or "float" for site in run.plan.sites}
    assert wrong_classes(run) == {}


def test_the_converted_model_runs_and_the_callers_is_bit_identical(case):
    run, before = case
    actual = outputs(run.converted, run.batches[1])
    assert actual
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in actual)
    assert snapshot(run.model) == before
