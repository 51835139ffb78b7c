"""The one measure of what quantization costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qrecipe.model.nested import tensors_in


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of equal shape, in dB.

    Equal tensors give +inf; noise over a zero reference gives -inf; NaN anywhere gives NaN.
    Infinite values that both have, as in masks, are ignored.

    Source: 20 log10(|x| / |x - y|), as in torch's Numeric Suite.

    >>> sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    20.0
    """
    expected, actual = without_shared_infinities(reference.double(), candidate.double())
    signal = torch.linalg.vector_norm(expected).item()
    noise = torch.linalg.vector_norm(expected - actual).item()
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 20 * math.log10(signal / noise)


def without_shared_infinities(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors without the positions where both hold the same infinity."""
    shared = expected.isinf() & (expected == actual)
    return (expected[~shared], actual[~shared]) if bool(shared.any()) else (expected, actual)


def output_sqnr_db(reference: Any, candidate: Any) -> float | None:
    """The SQNR in dB of the worst floating tensor in two outputs of a model.

    None if the outputs have no floating tensors; NaN if they differ in structure.
    """
    expected, actual = _floating(reference), _floating(candidate)
    if not expected and not actual:
        return None
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return math.nan
    return min(sqnr_db(a, b) for a, b in zip(expected, actual, strict=True))


def _floating(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
