"""Moving averages that cling to the first batches are warned about, and others are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from plans import recipe
from runs import STATIC, silent
from torch import nn

import qrecipe
from qrecipe.errors import QRecipeWarning
from qrecipe.sqnr import sqnr_db


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def batches(*scales):
    return [(torch.rand(16, 8) * 2 - 1) * scale for scale in scales]


def quantized(scales, a_recipe=STATIC):
    return qrecipe.quantize(model(), a_recipe, batches(*scales), progress=silent)


def test_a_quiet_first_batch_before_loud_ones_is_warned_about_with_the_ranges():
    with pytest.warns(QRecipeWarning, match="^QR232") as caught:
        converted = quantized([1, *[10] * 10], recipe(head='[lint]\nignore = ["QR203"]'))
    assert "of these ends with a range of 3.69, and most batches span 19.8" in str(
        caught[0].message
    )
    x = batches(10)[0]
    assert sqnr_db(model()(x), converted(x)) < 10


def test_a_first_batch_of_zeros_is_warned_about():
    with pytest.warns(QRecipeWarning, match="^QR232"):
        quantized([0, *[1] * 10], recipe(head='[lint]\nignore = ["QR203"]'))


@pytest.mark.parametrize("mended", ["larger constant", "minmax", "shuffled"])
def test_each_of_the_ways_out_that_the_warning_names_works(mended):
    observers = {
        "larger constant": '{ name = "moving_average_minmax", averaging_constant = 0.5 }',
        "minmax": '"minmax"',
        "shuffled": '"moving_average_minmax"',
    }
    scales = [10] * 5 + [1] + [10] * 5 if mended == "shuffled" else [1, *[10] * 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error", QRecipeWarning)
        converted = quantized(
            scales, recipe(f"[tensor.activation]\nobserver = {observers[mended]}")
        )
    x = batches(10)[0]
    assert sqnr_db(model()(x), converted(x)) > 20


def test_one_loud_batch_among_quiet_ones_is_what_an_average_is_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error", QRecipeWarning)
        quantized([1] * 6 + [100] + [1] * 6)


def test_a_second_calibration_starts_from_the_average_of_the_first():
    compiled = qrecipe.compile(model(), STATIC, batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches(*[1] * 10), progress=silent)
    with pytest.warns(QRecipeWarning, match="^QR232"):
        qrecipe.calibrate(prepared, batches(*[10] * 10), progress=silent)
