"""What the pairing check lets pass trains in torch as it converts, and what it stops does not."""

from __future__ import annotations

import itertools

import pytest
import torch

from qrecipe._torch_ao import quiet
from qrecipe.observers.qconfig import factory
from qrecipe.recipe.schema import TensorSpec, quantized_range
from qrecipe.recipe.tensor_checks import contradictions, missing_keys

OBSERVERS = [
    "minmax",
    "moving_average_minmax",
    "per_channel_minmax",
    "moving_average_per_channel_minmax",
    "histogram",
    "placeholder",
    {"name": "fixed_qparams", "scale": 0.05, "zero_point": 3},
]
FAKE_QUANTS = ["fake_quantize", "fused_moving_average", "learnable"]
DTYPES = ["int8", "uint8", "int4", "uint4"]
QSCHEMES = [
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
]
# Both signs in every channel: the fused kernel trains one-sided ones as affine in any scheme.
BATCH = torch.linspace(-20.0, 30.0, 120).sin().reshape(6, 20) * torch.arange(1.0, 7.0)[:, None]


def trains_as_it_converts(spec):
    """Whether torch can train with the spec, and the trained scale is the converted one."""
    with quiet():
        try:
            fake_quant = factory(spec, "qat", len(BATCH))()
            fake_quant(BATCH)
            scale, zero_point = fake_quant.calculate_qparams()
            observed, offset = fake_quant.activation_post_process.calculate_qparams()
        except Exception:
            return False
    low, high = quantized_range(spec)
    affine_float = spec.qscheme.endswith("float_qparams")
    return (
        torch.allclose(fake_quant.scale, observed, rtol=0.02)
        and torch.equal(fake_quant.zero_point.float(), offset.float())
        and torch.equal(zero_point.float(), offset.float())
        and torch.allclose(scale, observed, rtol=0.02)
        and (affine_float or bool(((low <= offset) & (offset <= high)).all()))
    )


@pytest.mark.parametrize("qscheme", QSCHEMES)
def test_pairs_that_pass_are_trained_by_torch_as_they_are_converted(qscheme):
    passing = [
        spec
        for observer, fake_quant, dtype in itertools.product(OBSERVERS, FAKE_QUANTS, DTYPES)
        if not any(
            contradictions(
                spec := TensorSpec.model_validate(
                    {
                        "observer": observer,
                        "fake_quant": fake_quant,
                        "dtype": dtype,
                        "qscheme": qscheme,
                    }
                )
            )
        )
    ]
    assert len(passing) >= len(DTYPES)
    assert [spec for spec in passing if not trains_as_it_converts(spec)] == []


def problems_of(**keys):
    return [problem.at[0] for problem in contradictions(TensorSpec.model_validate(keys))]


@pytest.mark.parametrize(
    ("keys", "at_fault"),
    [
        ({"observer": "minmax", "dtype": "int8", "qscheme": "per_channel_affine"}, ["qscheme"]),
        ({"observer": "placeholder", "dtype": "int8"}, ["observer"]),
        ({"observer": "placeholder", "dtype": "uint8", "is_dynamic": True}, []),
        ({"observer": "histogram", "dtype": "float16"}, ["observer"]),
        ({"dtype": "float16"}, []),
        (
            {"observer": "histogram", "dtype": "uint8", "fake_quant": "fused_moving_average"},
            ["fake_quant"],
        ),
        ({"observer": "per_channel_minmax", "dtype": "int8", "fake_quant": "learnable"}, []),
        ({"observer": "one_of_ours", "dtype": "int8", "fake_quant": "learnable"}, []),
        ({"observer": "minmax", "dtype": "int8", "quant_min": 1, "quant_max": 9}, ["quant_min"]),
    ],
)
def test_key_at_fault_is_named(keys, at_fault):
    assert problems_of(**keys) == at_fault


def test_pair_that_would_train_another_zero_point_is_stopped():
    keys = {
        "observer": "moving_average_minmax",
        "dtype": "uint8",
        "qscheme": "per_tensor_symmetric",
    }
    for fake_quant in ("fused_moving_average", "learnable"):
        assert problems_of(**keys, fake_quant=fake_quant) == ["fake_quant"]
        assert not trains_as_it_converts(
            TensorSpec.model_validate({**keys, "fake_quant": fake_quant})
        )


@pytest.mark.parametrize(("low", "high"), [(1, 9), (-9, -1), (0, 9), (-9, 0), (0, 0)])
def test_a_range_that_torch_refuses_is_a_contradiction(low, high):
    keys = {"observer": "minmax", "dtype": "int8", "qscheme": "per_tensor_affine"}
    spec = TensorSpec.model_validate({**keys, "quant_min": low, "quant_max": high})
    with quiet():
        try:
            factory(spec, "ptq")()
            is_refused = False
        except AssertionError:
            is_refused = True
    assert is_refused is any(contradictions(spec))


@pytest.mark.parametrize("observer", ["minmax", "per_channel_minmax"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "int32"])
def test_the_qscheme_that_is_proposed_where_it_is_missing_fits(observer, dtype):
    keys = {"observer": observer, "dtype": dtype}
    (missing,) = missing_keys(TensorSpec.model_validate(keys))
    assert missing.key == "qscheme"
    qscheme = missing.hint.rpartition(" = ")[2].strip('"')
    spec = TensorSpec.model_validate({**keys, "qscheme": qscheme})
    assert not any(missing_keys(spec))
    assert problems_of(**keys, qscheme=qscheme) == []
    with quiet():
        assert factory(spec, "ptq")().qscheme == getattr(torch, qscheme)
