"""The cnn-lstm example: its checkpoint, its strings of digits, and its recipe of two modes."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from places import ROOT
from runs import silent

import qrecipe

FOLDER = ROOT / "examples" / "cnn-lstm"
RECIPE = FOLDER / "mixed.toml"
LIMIT_BYTES = 600_000


@pytest.fixture(scope="module")
def reader():
    """The example's module; the folders that it makes importable are forgotten afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("read_digits")
    finally:
        sys.path[:] = before
        for name in ("read_digits", "digits"):
            sys.modules.pop(name, None)


def test_the_checkpoint_is_small_and_reads_a_class_at_each_place(reader):
    model, example_inputs = reader.factory()
    assert reader.CHECKPOINT.stat().st_size < LIMIT_BYTES
    assert not model.training
    assert model(*example_inputs).shape == (1, 3, 10)


def test_a_string_shows_three_digits_from_left_to_right(reader):
    digits = reader.Digits(torch.rand(10, 1, 28, 28), torch.arange(10))
    images, labels = reader.strings(digits, 5, seed=0)
    assert images.shape == (5, 1, 28, 84)
    for image, string in zip(images, labels, strict=True):
        for place, label in enumerate(string):
            shown = image[:, :, 28 * place : 28 * place + 28]
            assert torch.equal(shown, digits.images[label])


def test_strings_to_calibrate_on_are_made_of_training_digits(reader):
    training = {image.numpy().tobytes() for image in reader.training_digits().images}
    batches = reader.calibration()
    assert [tuple(batch.shape) for batch in batches] == [(64, 1, 28, 84)] * 10
    shown = (part for batch in batches for part in batch.unflatten(3, (3, 28)).unbind(3))
    assert all(image.numpy().tobytes() in training for images in shown for image in images)


def test_in_int8_it_reads_as_well_as_in_float(reader):
    model, _ = reader.factory()
    converted = qrecipe.quantize(model, RECIPE, reader.calibration(), progress=silent)
    accuracy = reader.evaluate(model)
    assert accuracy > 0.95
    assert reader.evaluate(converted) > accuracy - 0.01


def test_the_recipe_is_static_in_front_of_the_lstm_and_dynamic_from_there_on(reader):
    model, example_inputs = reader.factory()
    plan = qrecipe.plan(model, RECIPE, example_inputs)
    modes = {site.op: site.mode for site in plan.sites if site.verdict == "quantized"}
    assert modes == {"Conv2d+BatchNorm2d+ReLU": "static", "LSTM": "dynamic", "Linear": "dynamic"}
    base = qrecipe.plan(model, "builtin:cnn-lstm", example_inputs)
    assert base.boundaries == plan.boundaries + 2  # as the rule's reason says
