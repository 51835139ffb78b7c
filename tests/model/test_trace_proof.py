"""What counts as the same output of a model and of its graph."""

from __future__ import annotations

import math

import pytest
import torch
from plans import net_of
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.model.trace_proof import difference

ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        (ONES, ONES * 1.0015, True),
        (ONES, ONES * 1.0025, False),
        (torch.tensor([1000.0, 0.0]), torch.tensor([1000.0, 0.5]), True),
        (torch.tensor([1000.0, 0.0]), torch.tensor([1000.0, 2.5]), False),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]), True),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan]), False),
        (torch.zeros(0), torch.zeros(0), True),
        (ONES, torch.ones(2, 2), False),
        (ONES, ONES.double(), False),
        (torch.arange(3), torch.arange(3), True),
        (torch.arange(1000), torch.arange(1000) + 1, False),
        ((ONES, ONES), (ONES,), False),
        ((ONES,), (ONES, ONES), False),
        ({"a": ONES, "b": 2 * ONES}, {"a": ONES, "b": 2 * ONES}, True),
        ({"a": ONES, "b": 2 * ONES}, {"a": ONES, "b": ONES}, False),
    ],
)
def test_outputs_are_the_same_within_a_thousandth_of_the_largest_value(expected, actual, same):
    assert (difference(expected, actual) is None) is same


@pytest.mark.parametrize("change", [lambda z: z, torch.conj, lambda z: 1j * z])
@torch.no_grad()
def test_complex_outputs_are_compared(change):
    model = net_of(lambda self, x: change(torch.fft.rfft(self.layer(x))), layer=nn.Linear(8, 8))
    rows = torch.randn(4, 8)
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", [rows] * 10, progress=False)
    assert output_sqnr_db(model(rows), converted(rows)) > 25
    assert difference(model(rows), converted(rows)) == "a tensor differs"
