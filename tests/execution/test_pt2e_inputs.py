"""Programs that are given other inputs than those that they were exported for."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import NETS
from plans import net_of, recipe
from torch import nn

import qrecipe

pytest.importorskip("torchao")

STATIC = recipe(base="builtin:x86-static-minmax", head='executor = "pt2e"')
DYNAMIC = recipe(base="builtin:x86-dynamic", head='executor = "pt2e"')


def converted_net(name, a_recipe=STATIC):
    net = NETS[name]
    return qrecipe.quantize(net.model(), a_recipe, net.batches(10)), net.batches(1)[0]


@pytest.fixture(scope="module")
def mlp():
    return converted_net("mlp")


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            lambda x: x.double(),
            TypeError,
            "x must be a tensor of float32 with 2 dimensions, not a tensor of float64 with "
            "2 dimensions; pass x.to(torch.float32)",
        ),
        (lambda x: x.half(), TypeError, "not a tensor of float16 with"),
        (lambda x: x.int(), TypeError, "not a tensor of int32 with"),
        (lambda x: x > 0, TypeError, "not a tensor of bool with"),
        (lambda x: x.tolist(), TypeError, "with 2 dimensions, not list"),
        (lambda x: None, TypeError, "with 2 dimensions, not NoneType"),
        (
            lambda x: x[None],
            AssertionError,
            "inputs of other shapes than the example's: x must be a tensor of float32 with "
            "2 dimensions, not a tensor of float32 with 3 dimensions; compile the model",
        ),
        (lambda x: x[0], AssertionError, "not a tensor of float32 with 1 dimension;"),
        (
            lambda x: x[:, :3],
            AssertionError,
            "inputs of other shapes than the example's, which has x.shape[1] == 6; compile",
        ),
    ],
)
def test_what_a_program_cannot_take_is_said_with_what_it_expects(mlp, changed, error, text):
    made, x = mlp
    with pytest.raises(error) as caught:
        copy.deepcopy(made)(changed(x))
    assert text in str(caught.value)


def test_the_argument_is_named_also_in_a_container():
    model = net_of(lambda self, pair: self.fc(pair["a"]) + pair["b"], fc=nn.Linear(6, 4))
    batch = {"pair": {"a": torch.randn(3, 6), "b": torch.randn(3, 4)}}
    made = qrecipe.quantize(model, STATIC, [batch] * 10)
    with pytest.raises(
        TypeError, match=r"pair must be a tensor of float32 with 2 dim.* of float64"
    ):
        made({"a": batch["pair"]["a"].double(), "b": batch["pair"]["b"]})


def test_indices_may_have_fewer_bits_and_are_no_floats():
    made, tokens = converted_net("tagger")
    assert torch.equal(made(tokens), made(tokens.int()))
    with pytest.raises(TypeError, match=r"tokens must be a tensor of int64 .* not .* float32"):
        made(tokens.float())


def test_nothing_has_a_result_in_static_programs_and_no_range_in_dynamic_ones(mlp):
    made, x = mlp
    assert made(x[:0]).shape == (0, 4)
    dynamic, x = converted_net("mlp", DYNAMIC)
    with pytest.raises(ValueError, match="x is empty: dynamic layers find no range in it"):
        dynamic(x[:0])


def test_a_loaded_program_and_one_in_training_say_the_same(mlp, tmp_path):
    made, x = mlp
    qrecipe.save_quantized(made, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", NETS["mlp"].model())
    training = recipe(base="builtin:x86-static", head='phase = "qat"\nexecutor = "pt2e"')
    prepared = qrecipe.compile(NETS["mlp"].model(), training, x).prepare()
    for model in (loaded, prepared):
        with pytest.raises(TypeError, match="x must be a tensor of float32"):
            model(x.double())
