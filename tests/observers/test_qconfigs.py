"""Tensor specs become the observers and fake-quants that torch itself would take."""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao import quantization as tq
from torch.ao.quantization import qconfig as torch_qconfigs
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from qrecipe._torch_ao import quiet
from qrecipe.errors.findings import SchemaError
from qrecipe.observers.qconfig import factory, per_tensor, qconfig, torch_dtype
from qrecipe.recipe.schema import TensorSpec, quantized_range


class Specs(NamedTuple):
    weight: TensorSpec | None = None
    activation: TensorSpec | None = None


def spec(**keys):
    return TensorSpec.model_validate(keys)


WEIGHT = spec(observer="per_channel_minmax", dtype="int8", qscheme="per_channel_symmetric")
TENSOR_WEIGHT = spec(observer="minmax", dtype="int8", qscheme="per_tensor_symmetric")
ACTIVATION = spec(
    observer="histogram", dtype="uint8", qscheme="per_tensor_affine", reduce_range=True
)
WIDE = spec(observer="histogram", dtype="uint8")
DYNAMIC = spec(dtype="uint8", is_dynamic=True)
HALF = spec(dtype="float16")
EMBEDDING = spec(
    observer="per_channel_minmax", dtype="uint8", qscheme="per_channel_affine_float_qparams"
)
SYMMETRIC = {"dtype": "int8", "quant_min": -127, "quant_max": 127, "eps": 2**-12}


@pytest.mark.parametrize(
    ("specs", "theirs"),
    [
        (Specs(WEIGHT, WIDE), tq.get_default_qconfig("onednn")),
        (Specs(TENSOR_WEIGHT, WIDE), tq.get_default_qconfig("qnnpack")),
        (Specs(WEIGHT, DYNAMIC), torch_qconfigs.per_channel_dynamic_qconfig),
        (Specs(TENSOR_WEIGHT, DYNAMIC), torch_qconfigs.default_dynamic_qconfig),
        (
            Specs(HALF, spec(dtype="float16", is_dynamic=True)),
            torch_qconfigs.float16_dynamic_qconfig,
        ),
        (Specs(HALF, HALF), torch_qconfigs.float16_static_qconfig),
        (Specs(EMBEDDING), torch_qconfigs.float_qparams_weight_only_qconfig),
        (
            Specs(EMBEDDING.model_copy(update={"dtype": "uint4"})),
            torch_qconfigs.float_qparams_weight_only_qconfig_4bit,
        ),
        (
            Specs(
                spec(observer="minmax", qscheme="per_tensor_symmetric", **SYMMETRIC),
                spec(observer="histogram", dtype="int8", eps=2**-12),
            ),
            torch_qconfigs.default_symmetric_qnnpack_qconfig,
        ),
        (
            Specs(
                spec(observer="per_channel_minmax", qscheme="per_channel_symmetric", **SYMMETRIC),
                spec(observer="histogram", dtype="int8", eps=2**-12),
            ),
            torch_qconfigs.default_per_channel_symmetric_qnnpack_qconfig,
        ),
    ],
)
def test_defaults_of_torch_are_reproduced(specs, theirs):
    ours = qconfig(specs, "ptq")
    for made, expected in (
        (ours.weight(), theirs.weight()),
        (ours.activation(), expected_of(theirs)),
    ):
        assert settings_of(made) == settings_of(expected)


def expected_of(theirs):
    with quiet():
        return theirs.activation()


SETTINGS = ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "bins", "ch_axis", "scale")


def settings_of(module):
    found = {name: getattr(module, name, None) for name in SETTINGS}
    observer = getattr(module, "activation_post_process", None)
    eps = getattr(module, "eps", None)
    return (
        type(module),
        found,
        float(eps) if eps is not None else None,
        (settings_of(observer) if observer is not None else None),
    )


@pytest.mark.parametrize("backend", ["x86", "fbgemm"])
def test_reduced_range_is_torchs_but_without_its_warning(backend):
    theirs = expected_of(tq.get_default_qconfig(backend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = qconfig(Specs(WEIGHT, ACTIVATION), "ptq").activation()
    assert settings_of(ours) == settings_of(theirs)
    batch = torch.linspace(-3, 5, 999).sinh()
    assert qparams(ours, batch) == qparams(theirs, batch)


def qparams(module, *batches):
    for batch in batches:
        module(batch)
    scale, zero_point = module.calculate_qparams()
    return scale.tolist(), zero_point.tolist()


def test_qat_wraps_the_observer_as_torchs_default_does():
    moving = spec(observer="moving_average_minmax", dtype="uint8", reduce_range=True)
    channels = spec(
        observer="moving_average_per_channel_minmax", dtype="int8", qscheme="per_channel_symmetric"
    )
    theirs = tq.get_default_qat_qconfig("x86", version=0)
    ours = qconfig(Specs(channels, moving), "qat")
    assert settings_of(ours.activation()) == settings_of(expected_of(theirs))
    assert settings_of(ours.weight()) == settings_of(theirs.weight())

    fused = {"fake_quant": "fused_moving_average"}
    theirs = tq.get_default_qat_qconfig("x86", version=1)
    ours = qconfig(Specs(spec(**dump(channels), **fused), spec(**dump(moving), **fused)), "qat")
    assert settings_of(ours.activation()) == settings_of(expected_of(theirs))
    assert settings_of(ours.weight()) == settings_of(theirs.weight())


def dump(value):
    return value.model_dump(exclude_none=True)


def test_ptq_ignores_the_fake_quant():
    assert factory(spec(**dump(WEIGHT), fake_quant="learnable"), "ptq") is factory(WEIGHT, "ptq")


def test_learnable_fake_quant_knows_the_range_of_its_observer():
    learnable = {"name": "learnable", "use_grad_scaling": True}
    four_bits = spec(observer="moving_average_minmax", dtype="int4", fake_quant=learnable)
    module = factory(four_bits, "qat")()
    observer = module.activation_post_process
    assert (module.quant_min, module.quant_max) == (observer.quant_min, observer.quant_max)
    assert (module.quant_min, module.quant_max, module.use_grad_scaling) == (-8, 7, True)
    assert module(torch.randn(5, 3)).unique().numel() <= 16


def test_fixed_qparams_get_the_fake_quant_that_fx_asks_for():
    sigmoid = spec(
        observer={"name": "fixed_qparams", "scale": 1 / 256, "zero_point": 0}, dtype="uint8"
    )
    theirs = tq.default_fixed_qparams_range_0to1_fake_quant()
    assert settings_of(factory(sigmoid, "qat")()) == settings_of(theirs)
    assert isinstance(factory(sigmoid, "ptq")(), tq.FixedQParamsObserver)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dtype": "int8"}, (-128, 127)),
        ({"dtype": "uint8"}, (0, 255)),
        ({"dtype": "uint8", "reduce_range": True}, (0, 127)),
        ({"dtype": "int8", "reduce_range": True}, (-64, 63)),
        ({"dtype": "int4"}, (-8, 7)),
        ({"dtype": "uint4"}, (0, 15)),
        ({"dtype": "int8", "quant_min": -127}, (-127, 127)),
        ({"dtype": "int32"}, (-(2**31), 2**31 - 1)),
    ],
)
@pytest.mark.parametrize("phase", ["ptq", "qat"])
def test_observer_uses_the_range_of_its_spec(keys, expected, phase):
    made = factory(spec(observer="minmax", **keys), phase)()
    assert quantized_range(spec(**keys)) == expected
    assert (made.quant_min, made.quant_max) == expected


def test_full_range_that_is_spelt_out_means_the_same_as_none():
    plain = spec(observer="minmax", dtype="uint8", qscheme="per_tensor_symmetric")
    spelt = spec(**dump(plain), quant_min=0, quant_max=255)
    assert factory(plain, "ptq") is factory(spelt, "ptq")


def test_equal_values_share_one_qconfig():
    first = qconfig(Specs(WEIGHT, ACTIVATION), "ptq")
    assert qconfig(Specs(spec(**dump(WEIGHT)), spec(**dump(ACTIVATION))), "ptq") is first
    assert qconfig(Specs(WEIGHT, ACTIVATION), "qat") is not first
    assert qconfig(Specs(WEIGHT, WIDE), "ptq") is not first


def test_spec_without_dtype_is_an_error_of_ours():
    with pytest.raises(SchemaError, match="QR103"):
        torch_dtype(spec(observer="minmax"))


def test_per_channel_weights_have_a_per_tensor_substitute():
    moving = {"name": "moving_average_per_channel_minmax", "averaging_constant": 0.5}
    substitute = per_tensor(spec(**dump(WEIGHT) | {"observer": moving}))
    assert substitute.qscheme == "per_tensor_symmetric"
    assert substitute.observer.name == "moving_average_minmax"
    assert substitute.observer.arguments == {"averaging_constant": 0.5}
    assert per_tensor(WEIGHT) == TENSOR_WEIGHT
    assert per_tensor(TENSOR_WEIGHT) is TENSOR_WEIGHT


PER_TENSOR = ["minmax", "moving_average_minmax", "histogram"]
PER_CHANNEL = ["per_channel_minmax", "moving_average_per_channel_minmax"]
SCHEMES = [(name, f"per_tensor_{form}") for name in PER_TENSOR for form in ("affine", "symmetric")]
SCHEMES += [
    (name, f"per_channel_{form}") for name in PER_CHANNEL for form in ("affine", "symmetric")
]


@given(
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    reduce=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    offset=st.floats(-3, 3),
    spread=st.floats(1e-3, 1e3),
)
def test_fake_quantized_values_in_range_are_off_by_half_a_step_at_most(
    scheme, dtype, reduce, fused, seed, offset, spread
):
    observer, qscheme = scheme
    fused = fused and observer.startswith("moving_average")
    keys = {"fake_quant": "fused_moving_average"} if fused else {}
    module = factory(
        spec(observer=observer, qscheme=qscheme, dtype=dtype, reduce_range=reduce, **keys), "qat"
    )()
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(4, 65, generator=generator) + offset) * spread
    y = module(x)
    scale, zero_point = module.scale, module.zero_point  # the fused kernel computes its own
    low, high = quantized_range(spec(dtype=dtype, reduce_range=reduce))
    if scale.numel() > 1:
        scale, zero_point = scale[:, None], zero_point[:, None]
    assert low <= zero_point.min()
    assert zero_point.max() <= high
    smallest, largest = (low - zero_point) * scale, (high - zero_point) * scale
    inside = (x >= smallest) & (x <= largest)
    assert ((y - x).abs() <= scale * 0.5 * (1 + 1e-4) + 1e-6 * x.abs())[inside].all()
    assert ((y >= smallest - 1e-5 * spread) & (y <= largest + 1e-5 * spread)).all()
    if observer != "histogram":
        assert ((smallest - x) <= scale * (1 + 1e-4)).all()
        assert ((x - largest) <= scale * (1 + 1e-4)).all()


def converted(model, specs, phase, example):
    mapping = tq.QConfigMapping().set_global(qconfig(specs, phase))
    with quiet():
        prepare = prepare_fx if phase == "ptq" else prepare_qat_fx
        prepared = prepare(copy.deepcopy(model).train(phase == "qat"), mapping, (example,))
        prepared(example)
        return convert_fx(prepared.eval())


@pytest.mark.parametrize("phase", ["ptq", "qat"])
@pytest.mark.parametrize(
    ("layer", "specs", "expected"),
    [
        (torch.nn.Linear(4, 4), Specs(WEIGHT, DYNAMIC), torch.ao.nn.quantized.dynamic.Linear),
        (torch.nn.Linear(4, 4), Specs(WEIGHT, ACTIVATION), torch.ao.nn.quantized.Linear),
        (torch.nn.Embedding(9, 4), Specs(EMBEDDING), torch.ao.nn.quantized.Embedding),
        (
            torch.nn.Embedding(9, 4),
            Specs(EMBEDDING.model_copy(update={"dtype": "uint4"})),
            torch.ao.nn.quantized.Embedding,
        ),
    ],
)
def test_fx_quantizes_static_dynamic_and_weight_only(layer, specs, expected, phase):
    is_embedding = isinstance(layer, torch.nn.Embedding)
    example = torch.tensor([[0, 3, 8]]) if is_embedding else torch.randn(8, 4)
    model = torch.nn.Sequential(layer).eval()
    result = converted(model, specs, phase, example)
    assert (
        type(result[0] if hasattr(result, "__getitem__") else result.get_submodule("0")) is expected
    )
    assert (result(example) - model(example)).abs().max() < 0.5


def test_quiet_holds_back_torchs_notices_only():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            tq.MinMaxObserver(reduce_range=True)
            warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["mine"]
