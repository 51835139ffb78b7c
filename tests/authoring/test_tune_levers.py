"""The levers of the search, and a whole search on the digits net."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch
from nets import NETS
from places import ROOT
from runs import silent
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver
from tuning import base, closeness, tuned

import qrecipe
from qrecipe.authoring.tune.levers import Candidate, Lever, levers_of
from qrecipe.errors.findings import QRecipeWarning
from qrecipe.registry import table as registered

EXAMPLE = ROOT / "examples" / "digits"

COARSE = """
[tensor.weight]
observer = "minmax"
qscheme = "per_tensor_symmetric"
"""


@pytest.mark.parametrize("vnni", [True, False])
def test_the_levers_are_those_that_change_something_and_that_the_cpu_allows(monkeypatch, vnni):
    monkeypatch.setattr("qrecipe.planning.target_cpu.has_vnni", lambda: vnni)
    net = NETS["residual"]

    def found(recipe):
        plan = qrecipe.plan(net.model(), recipe, net.batches(1)[0])
        return [lever.tensors for lever in levers_of(recipe, plan, "this")]

    names = ("histogram", "mse", "mean_minmax", "minmax", "moving_average_minmax")
    observers = [{"activation": {"observer": name}} for name in names]
    eighth = [{"activation": {"reduce_range": False}}] if vnni else []
    channels = {"weight": {"observer": "per_channel_minmax", "qscheme": "per_channel_symmetric"}}
    assert found(base()) == [*observers[:-1], *eighth]
    assert found(base(COARSE)) == [*observers[:-1], *eighth, channels]
    assert found(qrecipe.load_recipe("builtin:x86-static-minmax"))[3] == observers[-1]
    assert found(qrecipe.load_recipe("builtin:x86-static-histogram")) == eighth
    assert found(qrecipe.load_recipe("builtin:arm-static")) == observers[:-1]
    assert found(qrecipe.load_recipe("builtin:x86-dynamic")) == []


def test_an_observer_of_a_plugin_is_not_replaced():
    class HouseRange(MinMaxObserver):
        pass

    qrecipe.register_observer("house_range")(HouseRange)
    try:
        net = NETS["residual"]
        recipe = base('[tensor.activation]\nobserver = "house_range"\n')
        plan = qrecipe.plan(net.model(), recipe, net.batches(1)[0])
        found = levers_of(recipe, plan, "this")
    finally:
        registered.remove("observer", "house_range")
    assert not [lever for lever in found if lever.what.startswith("histogram")]


def test_a_cheap_lever_that_is_enough_leaves_nothing_float():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 8).reshape(8, 1, 1, 1))
        model[2].weight.div_(torch.logspace(-2, 1, 8).reshape(1, 8, 1, 1))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    evaluate = closeness(model, batches)
    loss = -evaluate(qrecipe.quantize(model, base(COARSE), batches, progress=silent))
    allowed = 0.8 * loss
    result = tuned(model, batches, evaluate, base(COARSE), max_drop=allowed, target_cpu="vnni")
    assert result.reached
    assert result.float_sites == ()
    levers = [lever.what for trial in result.trials[-1:] for lever in trial.candidate.levers]
    assert levers
    assert levers[-1][1:] in result.recipe.description
    assert all(trial.candidate.floats == frozenset() for trial in result.trials)


def digits():
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module("digits"), importlib.import_module("rescale")
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.mark.slow
def test_the_stressed_digits_net_comes_back_within_the_budget():
    example, rescale = digits()
    model = rescale.rescaled(example.factory()[0], seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        result = tuned(
            model, example.calibration(), example.evaluate, "builtin:x86-static", max_drop=0.003
        )
    assert result.trials[0].metric < 0.9
    assert result.float_metric >= 0.97
    assert result.reached
    assert len(result.float_sites) < 9
    assert result.float_share < 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(model, result.recipe, example.calibration(), progress=silent)
    assert example.evaluate(converted) == result.metric


def test_a_lever_replaces_those_that_set_the_same_keys():
    levers = [
        Lever(what, {"activation": {key: value}})
        for what, key, value in (("a", "observer", "mse"), ("b", "bits", 8), ("c", "observer", "x"))
    ]
    candidate = Candidate()
    for lever in levers:
        candidate = candidate.with_lever(lever)
    assert [lever.what for lever in candidate.levers] == ["b", "c"]
