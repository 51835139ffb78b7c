"""Copies of a converted model, and what is loaded into it, run on the engines of the plan."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from routed import recipe_of_roots
from runs import silent
from shares import every
from torch import nn

import qrecipe

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def _whole():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 3, stride=2)).eval()


def _functions():
    def forward(self, x):
        return F.conv_transpose2d(self.a(x), self.up.weight, self.up.bias, stride=2)

    torch.manual_seed(0)
    return net_of(forward, a=nn.Conv2d(8, 8, 1), up=nn.ConvTranspose2d(8, 4, 3))


def _kernel_of_two_rows():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2)).eval()


MODELS = [_whole, _functions, _kernel_of_two_rows]


def _inside(model):
    """The model as a root of another."""
    return net_of(lambda self, x: self.inner(x if x.isfinite().all() else x * 0), inner=model)


@pytest.mark.parametrize("case", every(2, product([False, True], MODELS)))
def test_a_copy_computes_the_same_and_so_does_its_copy(case, tmp_path):
    is_root, made = case
    model = _inside(made()) if is_root else made()
    recipe = recipe_of_roots(["inner"]) if is_root else "builtin:x86-static-minmax"
    converted = qrecipe.quantize(model, recipe, [X] * 10, progress=silent)
    assert any(site.engine for site in qrecipe.plan(model, recipe, X))
    expected = converted(X)
    copied = copy.deepcopy(converted)
    for each in (copied, copy.deepcopy(copied), copy.deepcopy(nn.Sequential(converted))):
        assert torch.equal(each(X), expected)
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(copied, file)
    loaded = qrecipe.load_quantized(file, _inside(made()) if is_root else made())
    assert torch.equal(copy.deepcopy(loaded)(X), expected)


def test_layers_with_an_engine_of_their_own_have_the_classes_that_tools_look_for():
    converted = qrecipe.quantize(_whole(), "builtin:x86-static-minmax", [X] * 10, progress=silent)
    for each in (converted, copy.deepcopy(converted)):
        kinds = {type(module) for module in each.modules() if hasattr(module, "_packed_params")}
        assert kinds <= {torch.ao.nn.quantized.Conv2d, torch.ao.nn.quantized.ConvTranspose2d}


@pytest.mark.parametrize("made", [_whole, _kernel_of_two_rows])  # torch loads no functions' weights
@pytest.mark.parametrize("is_root", [False, True])
def test_a_state_dict_is_loaded_for_the_engines_of_the_plan(made, is_root):
    model = _inside(made()) if is_root else made()
    recipe = recipe_of_roots(["inner"]) if is_root else "builtin:x86-static-minmax"
    converted = qrecipe.quantize(model, recipe, [X] * 10, progress=silent)
    expected = converted(X)
    other = qrecipe.quantize(model, recipe, [X * 0.5] * 10, progress=silent)
    assert not torch.equal(other(X), expected)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    for into, state in (
        (copy.deepcopy(other), converted.state_dict()),
        (other, torch.load(file)),
    ):
        into.load_state_dict(state)
        assert torch.equal(into(X), expected)


@pytest.mark.parametrize("made", MODELS)
def test_torchscript_is_refused_where_its_file_would_compute_something_else(made):
    model = made()
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", [X] * 10, progress=silent)
    for each in (converted, copy.deepcopy(converted), nn.Sequential(converted)):
        with pytest.raises(qrecipe.ArtifactError, match=r"QR512 .* engine .* wrongly"):
            torch.jit.trace(each, X)
    with pytest.raises(qrecipe.ArtifactError, match=r"save_quantized"):
        torch.jit.script(converted)


def test_torchscript_stores_what_the_engine_of_the_backend_computes_rightly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)).eval()
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", [X] * 10, progress=silent)
    assert qrecipe.provenance(converted).plan.count('"onednn"') == 2
    assert torch.equal(torch.jit.trace(converted, X)(X), converted(X))
