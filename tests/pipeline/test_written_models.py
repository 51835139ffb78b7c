"""Models as other libraries write them are quantized by the recipe that is suggested for them."""

from __future__ import annotations

import warnings

import pytest
import torch
from libraries import TIMM, TRANSFORMERS, WRITTEN, call

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db

ALWAYS = {"torch.nn.TransformerEncoder"}
"""Needs no library and little time; nets of our own that are spelt as theirs are in tests/model."""
LEAST_DB = 14.0
"""What ends below it has warned: 15 dB, and the decibel that the audit lets pass."""

BELOW = {"levit_128s": "12 dB on held-out images, and no warning: the judged ones have above 15"}
"""With random weights; another batch may have less than the first, which is all that is judged."""


def _runs():
    for name, written in WRITTEN.items():
        missing = written.missing()
        marks = [pytest.mark.skipif(missing is not None, reason=str(missing))]
        if name not in ALWAYS:
            marks.append(pytest.mark.slow)
        if name in BELOW:
            marks.append(pytest.mark.xfail(strict=True, reason=BELOW[name]))
        yield pytest.param(written, id=name, marks=marks)


@pytest.mark.parametrize("written", list(_runs()))
def test_a_model_is_quantized_by_its_suggested_recipe(written):
    model, batches = written.model(), written.batches(6)
    held_out = batches.pop()
    recipe = qrecipe.suggest(model, batches[0], num_batches=len(batches))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        converted = qrecipe.quantize(model, recipe, batches, progress=False)
    with torch.no_grad():
        expected, actual = call(model, held_out), call(converted, held_out)
        call(converted, written.batch(3))  # another number of items
    sqnr = output_sqnr_db(expected, actual)
    codes = {str(each.message)[:5] for each in warned}
    assert sqnr is not None
    assert sqnr > LEAST_DB or codes & {"QR203", "QR226", "QR232"}


def test_the_corpus_is_as_large_as_its_page_says():
    assert len(TIMM) >= 20
    assert len(TRANSFORMERS) >= 8
