"""Modules that do more than their class says: hooks, parametrizations, a forward of their own."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites, verdicts
from runs import STATIC, silent
from shares import every
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import qrecipe
from qrecipe._torch_fx import QConfigMapping
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import QRecipeWarning


def pair():
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()


def images(count=10):
    return [torch.randn(4, 4, 10, 10) for _ in range(count)]


def quantized_db(model, a_recipe=STATIC):
    batches = images()
    converted = qrecipe.quantize(model, a_recipe, batches, progress=silent)
    with torch.no_grad():
        return sqnr_db(model(batches[-1]), converted(batches[-1]))


def doubled(module, args, output):
    return output * 2


def clamped(module, args):
    return (args[0].clamp(max=0.5),)


def standardised(self, x):
    return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def with_hook(model):
    model[0].register_forward_hook(doubled)


def with_pre_hook(model):
    model[0].register_forward_pre_hook(clamped)


def with_its_own_forward(model):
    model[0].forward = types.MethodType(standardised, model[0])


def parametrized(model):
    parametrizations.weight_norm(model[0])


ALTERATIONS = {
    with_hook: "hooks, which kernels do not run: doubled",
    with_pre_hook: "hooks, which kernels do not run: clamped",
    with_its_own_forward: "forward was replaced",
    parametrized: "remove_parametrizations",
}


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_a_leaf_that_does_more_than_its_class_stays_float_with_the_reason_and_is_right(alter):
    model = pair()
    alter(model)
    found = sites(qrecipe.plan(model, STATIC, images(1)[0]))
    assert found["0"].verdict == "float"
    assert ALTERATIONS[alter] in found["0"].reason
    assert found["2"].verdict == "quantized"
    assert quantized_db(model) > 25


def test_torch_loses_the_hook_of_a_convolution():
    from torch.ao.quantization import default_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = pair(), images(1)[0]
    with_hook(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(model, QConfigMapping().set_global(default_qconfig), (x,))
        prepared(x)
        converted = convert_fx(prepared)
    assert sqnr_db(model(x), converted(x)) < 10


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_a_rule_that_names_such_a_leaf_is_an_error(alter):
    model = pair()
    alter(model)
    named = recipe('[rules.module_name]\n"0" = "int8"')
    with pytest.raises(qrecipe.QRecipeError, match="QR303"):
        qrecipe.plan(model, named, images(1)[0])


def test_an_activation_with_a_hook_is_not_fused_away():
    model = pair()
    model[1].register_forward_hook(doubled)
    plan = qrecipe.plan(model, STATIC, images(1)[0])
    assert verdicts(plan) == {"0": "quantized", "1": "float", "2": "quantized"}
    assert quantized_db(model) > 25


NORMED = {
    "weight_norm": lambda: (parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "spectral_norm": lambda: (
        *(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()),
    ),
    "old_weight_norm": lambda: (weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "old_spectral_norm": lambda: (spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "pruned": lambda: (
        *(prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5), nn.BatchNorm2d(4)),
    ),
    "no_statistics": lambda: (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", every(2, NORMED))
def test_what_torch_fails_to_fuse_with_a_batch_norm_stays_apart_and_the_rest_is_quantized(kind):
    model = nn.Sequential(*NORMED[kind](), nn.Conv2d(4, 4, 3)).eval()
    with torch.no_grad():
        model(images(1)[0])
        plan = qrecipe.plan(model, STATIC, images(1)[0])
        float_site = "1" if kind == "no_statistics" else "0"
        assert sites(plan)[float_site].verdict == "float"
        assert verdicts(plan)[str(len(model) - 1)] == "quantized"
        assert quantized_db(model) > 25


def test_hooks_on_a_container_are_warned_about_with_what_remains_of_them():
    class Body(nn.Sequential):
        pass

    model = nn.Sequential(Body(nn.Conv2d(4, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3)).eval()
    model[0].register_forward_hook(doubled)
    with pytest.warns(QRecipeWarning, match="^QR230 0 has hooks.* compute with tensors is kept"):
        assert quantized_db(model) > 25
    accepted = recipe(head='[lint]\nignore = ["QR230"]')
    assert quantized_db(model, accepted) > 25


def test_a_hook_on_the_model_itself_that_computes_is_refused():
    model = pair()
    model.register_forward_hook(doubled)
    with pytest.raises(qrecipe.PlanError, match="QR306"):
        qrecipe.plan(model, STATIC, images(1)[0])


def test_hooks_inside_a_module_that_is_not_traced_stay_and_are_no_reason_to_warn():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else -self.conv(x)

    model = net_of(lambda self, x: self.last(self.router(x)), router=Router(), last=pair())
    model.router.conv.register_forward_hook(doubled)
    kept = recipe(head='[fx]\nnon_traceable_module_name = ["router"]')
    assert quantized_db(model, kept) > 25
