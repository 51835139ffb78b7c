"""Ranges that torch's observers take from bad data without a word: docs/traps.md."""

from __future__ import annotations

import math

import plain_torch as plain
import pytest
import torch
from plain_torch import everything, silence
from runs import HEAD, STATIC, silent
from torch import nn
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import CalibrationError, QRecipeWarning

ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
EMPTY = torch.empty(0, 8)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def of_torch(batches, **qconfig):
    observing = plain.prepared(model(), everything(**qconfig), ROWS)
    for batch in batches:
        observing(batch)
    return plain.convert_fx(observing)


def only_code(batches):
    compiled = qrecipe.compile(model(), STATIC, ROWS)
    with pytest.raises(CalibrationError) as caught:
        qrecipe.calibrate(compiled.prepare(), batches, progress=silent)
    return {finding.code for finding in caught.value.findings}


@pytest.mark.parametrize("batches", [[], [EMPTY]], ids=["none", "empty"])
def test_torch_converts_without_calibration_to_a_scale_of_one_and_here_it_is_an_error(batches):
    with pytest.warns(UserWarning, match="must run observer before"):
        theirs = of_torch(batches)
    assert theirs.get_submodule("0").scale == 1.0
    assert sqnr_db(model()(ROWS), theirs(ROWS)) < 10
    compiled = qrecipe.compile(model(), STATIC, ROWS)
    with pytest.raises(CalibrationError, match="never calibrated"):
        compiled.convert(compiled.prepare())
    assert only_code(batches * 10) in ({"QR401"}, {"QR402"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_batch_spoils_torchs_scale_silently_and_here_the_batch_is_named(value):
    bad = ROWS.clone()
    bad[0, 0] = value
    with silence():
        theirs = of_torch([ROWS, bad, ROWS], activation=plain.activation(MinMaxObserver))
    finite = math.isfinite(theirs.get_submodule("0").scale)
    assert not (finite and bool(torch.isfinite(theirs(ROWS)).all()))
    histogram = HistogramObserver.with_args(dtype=torch.quint8)
    with pytest.raises((RuntimeError, ValueError), match="finite"):
        of_torch([ROWS, bad], activation=histogram)
    compiled = qrecipe.compile(model(), STATIC, ROWS)
    with pytest.raises(CalibrationError, match="batch 1 has 1 NaN or infinite"):
        qrecipe.calibrate(compiled.prepare(), [ROWS, bad, *[ROWS] * 8], progress=silent)


SMALL_THEN_LARGE = [ROWS, *[ROWS * 10] * 9]


def input_high(prepared):
    return float(prepared.activation_post_process_0.max_val)


def test_torchs_moving_average_clings_to_the_first_batch():
    """Here few batches are warned about, and the recipe sets the constant: see below."""
    observing = plain.prepared(model(), everything(), ROWS)
    with silence():
        for batch in SMALL_THEN_LARGE:
            observing(batch)
    assert input_high(observing) < 0.25 * float(SMALL_THEN_LARGE[1].max())


def test_few_batches_are_warned_about_and_the_recipe_sets_the_constant_of_the_average():
    compiled = qrecipe.compile(model(), STATIC, ROWS)
    with pytest.warns(QRecipeWarning) as caught:
        qrecipe.calibrate(compiled.prepare(), SMALL_THEN_LARGE[:9], progress=silent)
    assert [str(warning.message)[:5] for warning in caught] == ["QR201"]
    quick = qrecipe.parse_recipe(
        f"{HEAD}[tensor.activation]\n"
        'observer = { name = "moving_average_minmax", averaging_constant = 0.5 }'
    )
    prepared = qrecipe.compile(model(), quick, ROWS).prepare()
    qrecipe.calibrate(prepared, SMALL_THEN_LARGE, progress=silent)
    assert input_high(prepared) > 0.9 * float(SMALL_THEN_LARGE[1].max())
    enough = qrecipe.parse_recipe(f"{HEAD}[calibration]\nmin_batches = 11")
    with pytest.raises(CalibrationError, match="at least 11"):
        qrecipe.quantize(model(), enough, SMALL_THEN_LARGE, progress=silent)
