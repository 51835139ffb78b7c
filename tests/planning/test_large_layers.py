"""A large linear layer runs on onednn, which is faster there on CPUs with VNNI and without."""

from __future__ import annotations

import pytest
import torch
from plans import net_of, recipe
from torch import nn

import qrecipe

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")

STATIC, DYNAMIC = "builtin:x86-static-minmax", "builtin:x86-dynamic"


def site_of(layer, x, a_recipe=DYNAMIC, forward=lambda self, x: self.layer(x)):
    return qrecipe.plan(net_of(forward, layer=layer), a_recipe, x)["layer"]


def untraceable(self, x):
    return self.layer(x) if x.isfinite().all() else x


@pytest.mark.parametrize("a_recipe", [STATIC, DYNAMIC])
def test_a_large_layer_runs_on_onednn_and_the_plan_says_why(a_recipe):
    site = site_of(nn.Linear(512, 1024), torch.zeros(8, 128, 512), a_recipe)
    assert site.engine == "onednn"
    assert site.reason == "on onednn's kernel: it is faster where there is this much to multiply"


def test_it_does_in_a_model_that_cannot_be_traced():
    x = torch.zeros(8, 128, 512)
    assert site_of(nn.Linear(512, 1024), x, forward=untraceable).engine == "onednn"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(512, 1023), (8, 128, 512)),  # just too few multiplications
        (nn.Linear(512, 512), (64, 32, 512)),  # few rows, if one item comes alone
        (nn.Linear(512, 1024), (1024, 512)),  # one row each
        (nn.Linear(384, 96), (8, 3136, 384)),  # few weights
    ],
)
@pytest.mark.parametrize("a_recipe", [STATIC, DYNAMIC])
def test_others_stay_on_fbgemm(layer, shape, a_recipe):
    assert site_of(layer, torch.zeros(shape), a_recipe).engine is None


AFFINE = """[tensor.weight]
observer = "per_channel_minmax"
qscheme = "per_channel_affine"
"""


@pytest.mark.parametrize(
    "a_recipe",
    [
        recipe(head='backend = "fbgemm"', base=DYNAMIC),
        recipe(head='backend = "onednn"', base=DYNAMIC),
        recipe(AFFINE, base=STATIC),
    ],
)
def test_who_chooses_an_engine_gets_it_and_onednn_takes_no_affine_weights(a_recipe):
    assert site_of(nn.Linear(512, 1024), torch.zeros(8, 128, 512), a_recipe).engine is None


def test_a_text_may_be_far_shorter_than_the_example():
    model = nn.Sequential(nn.Embedding(9, 512), nn.Linear(512, 1024)).eval()
    plan = qrecipe.plan(model, DYNAMIC, torch.zeros(8, 128, dtype=torch.long))
    assert plan["1"].engine is None
