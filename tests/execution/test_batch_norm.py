"""BatchNorms that torch folds along a wrong axis, or cannot fuse or quantize."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from plain_torch import converted, mapping
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

HEAD = 'format = 1\nextends = "builtin:{}"\n{}\n[lint]\nignore = ["QR208"]\n'
RECIPES = {
    "static": HEAD.format("x86-static", ""),
    "dynamic": HEAD.format("x86-dynamic", ""),
    "training": HEAD.format("x86-static", 'phase = "qat"'),
    "float": HEAD.format("x86-static", "")
    + '[rules]\nglobal = "float"\n[rules.module_name]\n"last" = "int8"\n',
}


class Net(nn.Module):
    """Layers one after another, and a last one that every recipe quantizes."""

    def __init__(self, shape, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(12, 12)
        self.batches = [torch.randn(shape) * 2 for _ in range(12)]
        for module in self.body:
            if getattr(module, "affine", False):
                nn.init.uniform_(module.weight, 0.2, 3)
        with torch.no_grad():
            for batch in self.batches:
                self(batch)
        self.eval()

    def forward(self, x):
        return self.last(self.body(x))


def quantized(model, recipe):
    if recipe.phase == "ptq":
        return qrecipe.quantize(model, recipe, model.batches, progress=silent)
    compiled = qrecipe.compile(model, recipe, model.batches[0])
    prepared = compiled.prepare()
    with torch.no_grad():
        for batch in model.batches:
            prepared(batch)
    return compiled.convert(prepared)


def points(*layers):
    torch.manual_seed(0)
    return Net((16, 12, 12), nn.Linear(12, 12), nn.BatchNorm1d(12), *layers)


def check_right_and_stored(model, found, mode, folder):
    """The quantized model is near the float one, and comes back from a file to the bit."""
    expected = found(model.batches[0])
    assert sqnr_db(model(model.batches[0]), expected) > (10 if mode == "training" else 25)
    qrecipe.save_quantized(found, folder / "m.safetensors")
    loaded = qrecipe.load_quantized(folder / "m.safetensors", model)
    assert torch.equal(loaded(model.batches[0]), expected)


def test_torch_folds_a_batch_norm_along_the_features_where_it_normalises_the_points():
    model = points()
    found = converted(model, mapping(), model.batches[0])  # all of it float
    assert sqnr_db(model(model.batches[0]), found(model.batches[0])) < 10


@pytest.mark.parametrize("case", every(4, product(RECIPES, [[], [nn.ReLU()], [nn.LeakyReLU()]])))
def test_a_batch_norm_over_points_is_not_folded_into_a_linear_layer(case, tmp_path):
    mode, layers = case
    model = points(*layers)
    found = quantized(model, qrecipe.parse_recipe(RECIPES[mode]))
    check_right_and_stored(model, found, mode, tmp_path)


def test_a_batch_norm_on_two_dimensions_is_folded_as_ever():
    model = Net((16, 12), nn.Linear(12, 12), nn.BatchNorm1d(12))
    first = qrecipe.plan(model, qrecipe.parse_recipe(RECIPES["static"]), model.batches[0]).sites[0]
    assert first.members == ("body.0", "body.1")


def test_a_convolution_of_one_sample_without_a_batch_stays_float_with_the_reason():
    model = Net((12, 12), nn.Conv1d(12, 12, 1), nn.BatchNorm1d(12))
    recipe = qrecipe.parse_recipe(RECIPES["static"])
    site = qrecipe.plan(model, recipe, model.batches[0]).sites[0]
    assert (site.members, site.verdict) == (("body.0",), "float")
    assert "need a batch dimension" in site.reason
    found = quantized(model, recipe)
    assert sqnr_db(model(model.batches[0]), found(model.batches[0])) > 25


@pytest.mark.parametrize("case", every(3, product([1, 2, 8], [True, False], [True, False])))
def test_a_batch_norm_is_folded_into_a_transposed_convolution_of_several_groups(case, tmp_path):
    groups, affine, bias = case
    torch.manual_seed(0)
    model = Net(
        (4, 8, 5, 10),
        nn.ConvTranspose2d(8, 16, 3, groups=groups, bias=bias),
        nn.BatchNorm2d(16, affine=affine),
    )
    found = quantized(model, qrecipe.parse_recipe(RECIPES["static"]))
    assert type(found.get_submodule("body.0")).__name__ == "ConvTranspose2d"
    assert not hasattr(found.get_submodule("body"), "1")
    expected = found(model.batches[0])
    assert sqnr_db(model(model.batches[0]), expected) > 25
    qrecipe.save_quantized(found, tmp_path / "m.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model)
    assert torch.equal(loaded(model.batches[0]), expected)


def test_torch_cannot_fold_a_batch_norm_into_a_transposed_convolution_of_several_groups():
    pair = nn.Sequential(nn.ConvTranspose2d(8, 16, 3, groups=2), nn.BatchNorm2d(16)).eval()
    with pytest.raises(RuntimeError, match="must match the size"):
        converted(pair, mapping(), torch.rand(2, 8, 5, 5))


BARE = {
    "after_linear": lambda: ((16, 12), nn.Linear(12, 12), nn.BatchNorm1d(12, affine=False)),
    "after_convolution": lambda: (
        *((4, 3, 5, 14), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
    ),
    "after_transposed": lambda: (
        *((4, 3, 5, 10), nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
    ),
    "alone": lambda: (
        *((4, 3, 5, 14), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8, affine=False)),
    ),
    "alone_with_relu": lambda: ((4, 3, 5, 12), nn.BatchNorm2d(3, affine=False), nn.ReLU()),
    "alone_in_three_dimensions": lambda: ((4, 3, 2, 5, 12), nn.BatchNorm3d(3, affine=False)),
    "alone_in_one_dimension": lambda: ((4, 3, 12), nn.BatchNorm1d(3, affine=False), nn.ReLU()),
}


@pytest.mark.parametrize("case", every(8, product(BARE, ["static", "training", "float"])))
def test_a_batch_norm_without_weights_is_folded_trained_and_quantized_like_others(case, tmp_path):
    kind, mode = case
    torch.manual_seed(0)
    model = Net(*BARE[kind]())
    keys = list(model.state_dict())
    found = quantized(model, qrecipe.parse_recipe(RECIPES[mode]))
    assert list(model.state_dict()) == keys
    check_right_and_stored(model, found, mode, tmp_path)


def test_a_batch_norm_without_weights_learns_none_in_training():
    model = Net(*BARE["after_convolution"]())
    recipe = qrecipe.parse_recipe(RECIPES["training"])
    prepared = qrecipe.compile(model, recipe, model.batches[0]).prepare()
    learnt = sum(parameter.requires_grad for parameter in prepared.parameters())
    assert learnt == sum(parameter.requires_grad for parameter in model.parameters())


def test_sensitivity_measures_a_batch_norm_without_weights():
    model = Net(*BARE["alone"]())
    recipe = qrecipe.parse_recipe(RECIPES["static"])
    report = qrecipe.sensitivity(model, recipe, model.batches, progress=silent)
    assert {site.name for site in report.sites} >= {"body.0", "body.2"}
