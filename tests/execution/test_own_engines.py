"""Linear layers that are packed for onednn compute the same, and stay packed for it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from plans import recipe
from runs import silent
from torch import nn

import qrecipe
from qrecipe.execution.engine import engine
from qrecipe.execution.own_engines import own_engines

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")

STATIC, DYNAMIC = "builtin:x86-static-minmax", "builtin:x86-dynamic"
TRAINED = recipe(head='phase = "qat"')
X = torch.randn(8, 128, 512, generator=torch.Generator().manual_seed(0))


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(512, 1024), nn.Linear(1024, 4)

    def forward(self, x):
        return self.last(self.first(x).relu())


class Untraced(Traced):
    def forward(self, x):
        return super().forward(x) if x.isfinite().all() else x


def quantized(made, a_recipe, seed=0):
    torch.manual_seed(seed)
    model = made()
    if a_recipe is not TRAINED:
        return qrecipe.quantize(model.eval(), a_recipe, [X], progress=silent)
    compiled = qrecipe.compile(model, a_recipe, X)
    prepared = compiled.prepare()
    prepared(X)
    return compiled.convert(prepared.eval())


KINDS = {
    "static": (Traced, STATIC),
    "trained": (Traced, TRAINED),
    "dynamic": (Traced, DYNAMIC),
    "untraced": (Untraced, DYNAMIC),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    made, a_recipe = KINDS[request.param]
    return made, a_recipe, quantized(made, a_recipe)


def is_packed_for_onednn(holder):
    """Of all engines, onednn alone keeps the weight that it packed."""
    first, second = holder._weight_bias()[0], holder._weight_bias()[0]
    return first.data_ptr() == second.data_ptr()


def is_on_onednn(model):
    """Whether the first of its layers is, and no other has an engine of its own."""
    (holder,) = own_engines(model)
    return is_packed_for_onednn(holder)


def test_torch_packs_a_copy_for_the_current_engine():
    with engine("onednn"):
        layer = torch.ao.nn.quantized.Linear(8, 8)
    assert is_packed_for_onednn(layer._packed_params)
    with engine("x86"):
        assert not is_packed_for_onednn(copy.deepcopy(layer)._packed_params)


def test_onednn_gives_an_empty_batch_in_two_dimensions():
    with engine("onednn"):
        dynamic, static = (
            torch.ao.nn.quantized.dynamic.Linear(8, 3),
            torch.ao.nn.quantized.Linear(8, 3),
        )
    x = torch.zeros(0, 4, 8)
    assert dynamic(x).shape == (0, 3)
    assert static(torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)).shape == (0, 3)


def test_the_kernel_is_onednns(kind):
    assert is_on_onednn(kind[2])


@pytest.mark.cpu
def test_the_result_is_fbgemms_but_for_ties(kind):
    *_, converted = kind
    usual = copy.deepcopy(converted)
    for holder in own_engines(usual):
        with engine("fbgemm"):
            weight, bias = holder._weight_bias()
            holder._packed_params = torch.ops.quantized.linear_prepack(weight, bias)
    assert not is_on_onednn(usual)
    error = (converted(X) - usual(X)).abs() / usual(X).abs().max()
    assert error.max() < 0.02
    assert error.mean() < 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 512), (3, 7, 512), (5, 512), (2, 3, 5, 512), (0, 4, 512)])
def test_the_first_input_does_not_decide_what_others_give(kind, shape):
    *_, converted = kind
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    converted(X)
    found = converted(x)
    assert torch.equal(found, copy.deepcopy(converted)(x))
    assert torch.equal(found, converted(x.transpose(0, 1).contiguous().transpose(0, 1)))
    assert found.shape == (*shape[:-1], 4)


def test_copies_and_pickled_models_stay_on_onednn(kind):
    *_, converted = kind
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    copied = copy.deepcopy(converted)
    for each in (copied, copy.deepcopy(copied), torch.load(file, weights_only=False)):
        assert is_on_onednn(each)
        assert torch.equal(each(X), converted(X))


def test_a_state_dict_is_packed_for_onednn(kind):
    made, a_recipe, converted = kind
    other = quantized(made, a_recipe, seed=1)
    assert not torch.equal(other(X), converted(X))
    other.load_state_dict(converted.state_dict())
    assert is_on_onednn(other)
    assert torch.equal(other(X), converted(X))


def test_a_stored_model_is_packed_for_onednn(kind, tmp_path):
    made, _, converted = kind
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, file)
    loaded = qrecipe.load_quantized(file, made().eval())
    assert is_on_onednn(loaded)
    assert torch.equal(loaded(X), converted(X))


def test_torchscript_computes_the_same(kind):
    made, _, converted = kind
    if made is Traced:
        assert torch.equal(torch.jit.trace(converted, X)(X), converted(X))
