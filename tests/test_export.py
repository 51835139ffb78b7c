"""Backends that torch has no kernels for give the reference model, to be handed on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qrecipe
from qrecipe.errors import UnsupportedError
from qrecipe.sqnr import sqnr_db

EXECUTORCH = """
format = 1
backend = "executorch"
[tensor.weight]
observer = "per_channel_minmax"
dtype = "int8"
qscheme = "per_channel_symmetric"
quant_min = -127
eps = 0.000244140625
quant_max = 127
[tensor.activation]
observer = "moving_average_minmax"
dtype = "int8"
qscheme = "per_tensor_affine"
eps = 0.000244140625
[qconfig.int8]
weight = "weight"
activation = "activation"
[rules]
global = "int8"
"""
TENSORRT = EXECUTORCH.replace("executorch", "tensorrt").replace(
    "per_tensor_affine", "per_tensor_symmetric"
)


def silent(done, total):
    pass


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(12)]


@pytest.mark.parametrize("text", [EXECUTORCH, TENSORRT], ids=["executorch", "tensorrt"])
def test_the_reference_model_runs_on_float_kernels_and_the_plan_says_what_it_is_for(text):
    model, recipe = net(), qrecipe.parse_recipe(text)
    plan = qrecipe.plan(model, recipe, batches()[0])
    assert plan.is_for_export
    assert "for export" in str(plan)
    converted = qrecipe.quantize(model, recipe, batches(), progress=silent)
    kinds = {type(module).__module__ for module in converted.modules()}
    assert any("quantized.reference" in kind for kind in kinds)
    assert not any("quantized.modules" in kind for kind in kinds)
    assert sqnr_db(model(batches()[0]), converted(batches()[0])) > 25
    assert qrecipe.provenance(converted).fingerprint == recipe.fingerprint


def test_unsigned_activations_are_refused_where_the_backend_takes_none():
    text = TENSORRT.replace(
        'dtype = "int8"\nqscheme = "per_tensor_symmetric"',
        'dtype = "uint8"\nqscheme = "per_tensor_affine"',
    )
    with pytest.raises(UnsupportedError):
        qrecipe.plan(net(), qrecipe.parse_recipe(text), batches()[0])


def reflecting():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=(1, 2), padding_mode="reflect")
    line = nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(2), line).eval()


@pytest.mark.parametrize("phase", ["ptq", "qat"])
@pytest.mark.parametrize("text", [EXECUTORCH, TENSORRT], ids=["executorch", "tensorrt"])
def test_padding_that_reflects_is_a_call_of_its_own_which_reference_convolutions_need(
    text, phase, tmp_path
):
    model, data = reflecting(), batches()
    recipe = qrecipe.parse_recipe(f'phase = "{phase}"\n{text}')
    compiled = qrecipe.compile(model, recipe, data[0])
    prepared = compiled.prepare()
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    converted = compiled.convert(prepared)
    expected = converted(data[0])
    assert sqnr_db(model(data[0]), expected) > 25
    qrecipe.save_quantized(converted, tmp_path / "m.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model)
    assert torch.equal(loaded(data[0]), expected)


def test_torchs_reference_convolution_pads_with_zeros_whatever_its_mode():
    reference = torch.ao.nn.quantized.reference
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    weight = {"qscheme": torch.per_tensor_affine, "dtype": torch.qint8, "scale": 0.01}
    weight["zero_point"] = 0
    made, x = reference.Conv2d.from_float(conv, weight), batches()[0]
    assert sqnr_db(conv(x), made(x)) < 15
    assert sqnr_db(conv(x)[..., 1:-1, 1:-1], made(x)[..., 1:-1, 1:-1]) > 30
