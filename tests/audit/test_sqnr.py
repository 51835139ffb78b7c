"""The measure that audits and reports share."""

from __future__ import annotations

import math

import pytest
import torch

from qrecipe.audit.sqnr import Totals, output_sqnr_db, sqnr_db

X = torch.tensor([1.0, -2.0, 4.0, -8.0])


def test_a_quantized_output_counts_by_what_it_stands_for():
    rounded = torch.quantize_per_tensor(X + 0.1, 0.5, 0, torch.qint8)
    assert output_sqnr_db(X, rounded) == sqnr_db(X, rounded.dequantize())


def test_the_worst_of_several_outputs_counts_wherever_it_stands():
    outputs = ({"a": X}, [X + 0.1])
    assert output_sqnr_db(({"a": X}, [X]), outputs) == sqnr_db(X, X + 0.1)
    lost = ({"a": X}, [X * math.nan])
    assert math.isnan(output_sqnr_db(({"a": X}, [X]), lost))


def test_one_batch_measures_what_the_sums_over_one_batch_say():
    totals = Totals()
    totals.add(X, X + 0.1)
    fidelity = totals.fidelity()
    assert fidelity.sqnr_db == sqnr_db(X, X + 0.1)
    assert fidelity.mse == pytest.approx(0.01, rel=1e-5)


def test_tensors_of_other_shapes_are_not_compared():
    assert math.isnan(sqnr_db(X, X[:2]))
    assert math.isnan(output_sqnr_db((X, X), (X,)))


def test_a_complex_output_counts_as_its_real_and_imaginary_parts():
    real, imaginary, noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    exact, off = torch.complex(real, imaginary), torch.complex(real, imaginary + noise / 10)
    expected = sqnr_db(torch.stack([real, imaginary]), torch.stack([real, imaginary + noise / 10]))
    assert output_sqnr_db(exact, off) == pytest.approx(expected)
    assert output_sqnr_db(exact.conj(), off.conj()) == pytest.approx(expected)
    assert output_sqnr_db(exact, exact) == math.inf
