"""What would let the model take a batch that it does not take: it is written, and works."""

from __future__ import annotations

import pytest
import torch
from failures import assert_equal_observers, observers, only, prepared_mlp, rows
from nets import Mlp
from plans import ROWS, net_of, recipe
from runs import STATIC, silent
from torch import nn
from torch.utils.data import TensorDataset

import qrecipe
from qrecipe.errors.findings import CalibrationError, PlanError
from qrecipe.model.remedies import remedy


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, 6), nn.Linear(6, 3)

    def forward(self, ids, mask=None):
        return self.head(self.table(ids).mean(1))


def cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def ids(count=4):
    return torch.randint(0, 30, (count, 5))


IMAGES = torch.rand(4, 3, 8, 8)
MENDABLE = {
    "numpy": (Mlp, ROWS.numpy(), "not a tensor"),
    "numpy of float64": (Mlp, ROWS.double().numpy(), "not float32"),
    "lists": (Mlp, ROWS.tolist(), "not a tensor"),
    "float64": (Mlp, ROWS.double(), "not float32"),
    "bytes": (cnn, (255 * IMAGES).byte(), "uint8, and not scaled"),
    "an image": (cnn, IMAGES[0], "no batch dimension"),
    "an image of bytes from a file": (
        cnn,
        (255 * IMAGES[0]).byte().permute(1, 2, 0).numpy(),
        "channels last, no batch dimension",
    ),
    "channels last": (cnn, IMAGES.permute(0, 2, 3, 1), "channels last"),
    "labels": (Mlp, (ROWS, torch.zeros(2)), "labels next to the input"),
    "labels of a list": (Mlp, [ROWS.numpy(), 3], "labels next to the input, not a tensor"),
    "labels after two": (
        lambda: net_of(lambda self, x, y: self.fc(x + y), fc=nn.Linear(6, 3)),
        (ROWS, ROWS, torch.zeros(2)),
        "labels next to the inputs",
    ),
    "another key": (Mlp, {"image": ROWS, "label": torch.zeros(2)}, "keys that do not fit"),
    "a key too many": (Words, {"ids": ids(), "labels": torch.zeros(4)}, "keys that forward lacks"),
    "floating indices": (Words, ids().float(), "not integers"),
    "keys of numpy": (Words, {"ids": ids().numpy(), "mask": ids().numpy()}, "not a tensor"),
    "a dict in a list": (Words, [{"ids": ids()}], "a dict in a list"),
}


@pytest.mark.parametrize("kind", MENDABLE)
def test_what_lets_the_model_take_a_batch_is_written_and_works(kind):
    make, batch, fault = MENDABLE[kind]
    model = make().eval()
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(model, DYNAMIC_OR_STATIC[make is Words], [batch] * 10, progress=silent)
    hint = only(caught, "QR402").hint
    assert fault in hint
    forward = eval(hint.partition("forward=")[2], {"torch": torch})
    assert torch.is_tensor(forward(model, batch))
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(model, STATIC, batch)
    hint = only(caught, "QR307").hint
    mended = eval(hint.rpartition("pass ")[2], {"torch": torch, "batch": batch})
    assert qrecipe.plan(model, STATIC, mended).sites


DYNAMIC_OR_STATIC = (STATIC, "builtin:x86-dynamic")


def test_a_later_batch_is_told_the_same_and_the_observers_stay_as_they_were():
    _, prepared = prepared_mlp()
    before = observers(prepared)
    with pytest.raises(CalibrationError, match=r"batch 1 .*ndarray float32") as caught:
        qrecipe.calibrate(prepared, [ROWS, ROWS.numpy()], progress=silent)
    assert "torch.as_tensor(batch)" in only(caught, "QR402").hint
    assert_equal_observers(before, observers(prepared))


@pytest.mark.parametrize("a_recipe", [STATIC, "builtin:x86-dynamic"])
def test_an_empty_first_batch_is_named_by_every_verb_and_a_later_one_does_no_harm(a_recipe):
    empty = torch.zeros(0, 6)
    with pytest.raises(CalibrationError, match=r"batch 0 .*it is empty") as caught:
        qrecipe.quantize(Mlp().eval(), a_recipe, [empty, *rows()], progress=silent)
    assert "skip it" in only(caught, "QR402").hint
    with pytest.raises(PlanError, match=r"QR307 .*it is empty"):
        qrecipe.plan(Mlp().eval(), a_recipe, empty)
    qrecipe.quantize(Mlp().eval(), a_recipe, [*rows(), empty], progress=silent)
    _, prepared = prepared_mlp()
    with pytest.raises(CalibrationError, match=r"batch 0 .*it is empty"):
        qrecipe.calibrate(prepared, [empty, *rows()], progress=silent)


def test_float_kernels_that_do_without_a_batch_dimension_are_explained():
    with pytest.raises(qrecipe.UnsupportedError, match="QR303") as caught:
        qrecipe.quantize(
            nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), STATIC, [IMAGES[0]] * 10, progress=silent
        )
    assert "x.unsqueeze(0)" in caught.value.findings[0].hint


def test_a_dataset_and_a_name_are_no_batches():
    for batches, cure in ((TensorDataset(ROWS), "DataLoader(dataset"), ("data", "a single batch")):
        with pytest.raises(CalibrationError) as caught:
            qrecipe.quantize(Mlp().eval(), STATIC, batches, progress=silent)
        assert cure in only(caught, "QR401").hint


def test_a_batch_that_is_not_at_fault_gets_no_remedy():
    def forward(model, batch):
        raise RuntimeError("not of the batch")

    assert remedy(Mlp().eval(), ROWS) is None
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, rows(), forward=forward, progress=silent)
    assert only(caught, "QR402").hint is None


class Masked(nn.Module):
    """Takes two inputs that may be missing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x, mask=None, bias=None):
        x = x if mask is None else x * mask
        return self.linear(x if bias is None else x + bias)


@pytest.mark.parametrize(
    ("names", "to_do"),
    [
        (("x", "mask", "bias"), "put bias into the example inputs too"),
        (("x",), "put mask into the batches too"),
        (("x", "bias"), "put bias into the example inputs too and put mask into the batches too"),
    ],
)
def test_a_batch_of_other_keywords_than_the_example_says_which_to_add(names, to_do):
    example = {"x": torch.ones(4, 6), "mask": torch.ones(4, 6)}
    prepared = qrecipe.compile(Masked().eval(), recipe(), example).prepare()
    with pytest.raises(CalibrationError) as error:
        qrecipe.calibrate(prepared, [dict.fromkeys(names, torch.ones(4, 6))])
    hint = only(error, "QR402").hint
    assert "(of the factory, or the first batch) had x, mask" in hint
    assert hint.endswith(f": {to_do}")


def test_a_call_with_an_input_that_the_example_lacked_says_so():
    example = {"x": torch.ones(4, 6)}
    converted = qrecipe.quantize(Masked().eval(), "builtin:x86-dynamic", example_inputs=example)
    with pytest.raises(AssertionError, match="mask was None in the example inputs"):
        converted(**example, mask=torch.ones(4, 6))
