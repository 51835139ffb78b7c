"""What is suggested beside int8: transforms of uneven channels, and sums that are better float."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import sites
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import QRecipeWarning


def _chain(*between, spread=6.0):
    """Two convolutions with something between them, and channels that differ 2**spread times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *between, nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[0] *= 2**spread
        model[len(between) + 1].weight[:, 0] /= 2**spread
    return model


IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_uneven_channels_between_layers_are_equalized_with_the_reason():
    model = _chain(nn.ReLU())
    recipe = qrecipe.suggest(model, IMAGES)
    assert recipe.transform.equalize.by == "activations"
    assert "the widest channel of 0 is" in recipe.description
    converted = [
        qrecipe.quantize(model, each, [IMAGES] * 10, progress=silent)
        for each in (recipe, "builtin:x86-static")
    ]
    after, before = (sqnr_db(model(IMAGES), each(IMAGES)) for each in converted)
    assert after > before + 6


@pytest.mark.parametrize(
    "model",
    [
        _chain(nn.ReLU(), spread=0.0),  # even as they are
        _chain(nn.ReLU6()),  # not the same for twice the input
        _chain(nn.BatchNorm2d(16), nn.GELU()),
    ],
)
def test_what_is_even_or_does_not_scale_is_not_equalized(model):
    assert qrecipe.suggest(model, IMAGES).transform.equalize is None


def test_a_dynamic_recipe_does_not_equalize():
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 64
        model[2].weight[:, 0] /= 64
    recipe = qrecipe.suggest(model, torch.randn(8, 64))
    assert recipe.name == "suggested-dynamic"
    assert recipe.transform.equalize is None


class Behind(nn.Module):
    """Linear layers behind a norm, the result of which is also added if ``post``."""

    def __init__(self, norm, *, post=False, factor=64.0):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = norm, nn.Linear(64, 64), nn.Linear(64, 64)
        self.post = post
        with torch.no_grad():
            norm.weight[0] *= factor
            self.first.weight[:, 0] /= factor
            self.second.weight[:, 0] /= factor

    def forward(self, x):
        normed = self.norm(x)
        result = self.first(normed).relu() * self.second(normed)
        return normed + result if self.post else result


SEQUENCES = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:.*QR203")
@pytest.mark.parametrize(
    ("norm", "post"),
    [
        (nn.LayerNorm, False),
        (nn.RMSNorm, True),
        pytest.param(nn.LayerNorm, True, marks=pytest.mark.slow),
        pytest.param(nn.RMSNorm, False, marks=pytest.mark.slow),
    ],
)
def test_linear_layers_behind_a_norm_with_large_channels_are_smoothed(norm, post):
    model = Behind(norm(64), post=post).eval()
    recipe = qrecipe.suggest(model, SEQUENCES)
    assert recipe.transform.smooth is not None
    assert "the widest channel of norm is" in recipe.description
    assert "needs calibration data" in recipe.description
    converted = [
        qrecipe.quantize(model, each, [SEQUENCES], progress=silent)
        for each in (recipe, "builtin:x86-dynamic")
    ]
    after, before = (sqnr_db(model(SEQUENCES), each(SEQUENCES)) for each in converted)
    assert after > before + 3


def test_even_channels_behind_a_norm_and_uneven_ones_behind_something_else_are_left():
    even = Behind(nn.LayerNorm(64), factor=1.0).eval()
    assert qrecipe.suggest(even, SEQUENCES).transform.smooth is None
    other = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        other[0].weight[0] *= 64
    assert qrecipe.suggest(other, SEQUENCES).transform.smooth is None


class Hybrid(nn.Module):
    """Convolutions, then residual connections around linear layers, and a mask."""

    def __init__(self, mask=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.scores = nn.Conv1d(32, 16, 1)
        self.register_buffer("mask", mask)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.first(self.norms[0](x))
        x = x + self.second(self.norms[1](x))
        scores = self.scores(self.norms[2](x).transpose(1, 2))
        scores = scores + scores.flip(1)
        return scores if self.mask is None else scores + self.mask


def test_residual_sums_of_a_transformer_stay_float_and_others_do_not():
    model = Hybrid().eval()
    plan = qrecipe.plan(model, qrecipe.suggest(model, IMAGES), IMAGES)
    found = sites(plan)
    assert (found[":add"].verdict, found[":add#1"].verdict) == ("float", "float")
    assert "residual sum" in found[":add"].rule.reason
    assert found[":add#2"].verdict == "quantized"


def test_norms_that_read_or_give_floats_stay_float():
    model = Hybrid().eval()
    found = sites(qrecipe.plan(model, qrecipe.suggest(model, IMAGES), IMAGES))
    assert {found[f"norms.{index}"].verdict for index in range(3)} == {"float"}
    assert found["first"].mode == "dynamic"  # it takes floats, so a norm before it gives some
    assert "slower than a float one" in found["norms.0"].rule.reason
    assert "its input is float" in found["norms.2"].rule.reason


class FedByFloats(nn.Module):
    """A gated block between activations without a kernel, and a block of integers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.squeeze, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.third = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = F.silu(self.first(x))
        gate = self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = self.second(x * torch.sigmoid(gate))
        x = F.hardswish(x) + self.third(x)
        rows = F.silu(x).flatten(2)
        products = rows @ rows.transpose(1, 2)
        return products + products.transpose(1, 2)


def test_what_reads_floats_and_has_no_weights_stays_float():
    model = FedByFloats().eval()
    recipe = qrecipe.suggest(model, IMAGES)
    found = sites(qrecipe.plan(model, recipe, IMAGES))
    for name in (":mul", ":matmul", ":add#1"):  # the gate alone is of integers
        assert found[name].verdict == "float"
        assert "its input is float" in found[name].rule.reason
    for name in ("first", "second", "third", "squeeze", "expand", ":hardswish", ":add"):
        assert found[name].verdict == "quantized"
    converted = qrecipe.quantize(model, recipe, [IMAGES] * 10, progress=silent)
    assert sqnr_db(model(IMAGES), converted(IMAGES)) > 20


def test_a_sum_with_a_mask_stays_float_and_is_told():
    model = Hybrid(torch.tensor([0.0, -1e4]).repeat(50)).eval()
    with pytest.warns(QRecipeWarning, match="QR237.*:add#3"):
        recipe = qrecipe.suggest(model, IMAGES)
    found = sites(qrecipe.plan(model, recipe, IMAGES))
    assert found[":add#3"].verdict == "float"
    assert "mask" in found[":add#3"].rule.reason
