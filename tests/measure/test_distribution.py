"""Counts of values over batches in constant memory."""

from __future__ import annotations

import math

import pytest
import torch

from qrecipe.measure.drift.distribution import Distribution


def test_counts_survive_the_widening_of_their_bins():
    torch.manual_seed(0)
    parts = [torch.randn(1000), torch.randn(1000) * 50, torch.zeros(10), torch.randn(500) * 0.1]
    counted = Distribution()
    for part in parts:
        counted.add(part)
    histogram = counted.histogram(16)
    values = torch.cat(parts)
    expected = torch.histc(values, 16, histogram.low, histogram.high)
    assert sum(histogram.counts) == values.numel()
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    difference = torch.tensor(histogram.counts) - expected
    assert difference.abs().max() <= 40  # a bin of 8192 lies across an edge


def test_infinity_is_left_out_of_the_counts():
    counted = Distribution()
    counted.add(torch.tensor([1.0, math.inf, -2.0, math.nan]))
    histogram = counted.histogram(4)
    assert (histogram.low, histogram.high, sum(histogram.counts)) == (-2, 1, 2)
    assert Distribution().histogram() is None


def test_the_share_of_a_distribution_is_that_of_its_values():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) - 0.5
    distribution = Distribution()
    for part in values.split(1_000):
        distribution.add(part)
    for limit in (-0.4, 0.0, 0.25, 1.0):
        expected = float((values > limit).float().mean())
        assert distribution.share(lambda x, limit=limit: x > limit) == pytest.approx(
            expected, abs=0.01
        )
