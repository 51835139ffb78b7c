"""The one measure of what quantization costs, of a single output or summed over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qrecipe.errors.text import finite_or_none
from qrecipe.model.nested import as_real, tensors_in


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors, in dB.

    Equal tensors give +inf; noise over a zero reference gives -inf; NaN anywhere, or another shape,
    gives NaN. Infinite values that both have, as masks do, are equal and count for nothing.

    Source: 20 log10(|x| / |x - y|), as in torch's Numeric Suite.

    >>> sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    20.0
    """
    sums = _Sums()
    sums.add(reference, candidate)
    return sums.sqnr_db


def output_sqnr_db(reference: Any, candidate: Any) -> float | None:
    """The SQNR in dB of the worst floating tensor in two outputs of a model.

    None if the outputs have no floating tensors; NaN if they differ in structure.
    """
    totals = Totals()
    totals.add(reference, candidate)
    fidelity = totals.fidelity()
    return None if fidelity is None else fidelity.sqnr_db


def energy_ratio_db(signal: float, noise: float) -> float:
    """Two sums of squares in dB, with the conventions of `sqnr_db`."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """SQNR in dB and mean squared error of a value against its reference.

    ``sqnr_db`` is +inf for equal tensors, -inf for noise over a zero reference, NaN if either has
    NaN or the shapes differ.

    Source: 20 log10(|x| / |x - y|), as in torch's Numeric Suite, with norms over all batches.
    """

    sqnr_db: float
    mse: float

    @property
    def exact(self) -> bool:
        """Whether the two are equal in every value."""
        return self.sqnr_db == math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values; non-finite numbers are null, told apart by ``exact``."""
        return {
            "sqnr_db": finite_or_none(self.sqnr_db),
            "mse": finite_or_none(self.mse),
            "exact": self.exact,
        }


@dataclass(slots=True)
class _Sums:
    """The energies of the reference and of the difference, for one tensor over all batches."""

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        if reference.shape != candidate.shape:
            self.noise = math.nan
            return
        self.count += reference.numel()
        expected, actual = reference.double(), candidate.double()
        signal = _energy(expected)
        if not math.isfinite(signal):  # only then can infinite values be shared
            shared = expected.isinf() & (expected == actual)
            expected, actual = expected[~shared], actual[~shared]
            signal = _energy(expected)
        self.signal += signal
        # strides may differ: flat views would pair the wrong values
        self.noise += _energy(expected - actual)

    def merge(self, other: _Sums) -> None:
        self.signal += other.signal
        self.noise += other.noise
        self.count += other.count

    @property
    def sqnr_db(self) -> float:
        return energy_ratio_db(self.signal, self.noise)


def _energy(x: Tensor) -> float:
    norm: float = torch.linalg.vector_norm(x).item()
    return norm * norm


@dataclass(slots=True)
class Totals:
    """Sums over batches of a value that holds any number of tensors.

    With several floating tensors, the SQNR is that of the worst and the MSE that of all values.
    """

    sums: list[_Sums] = field(default_factory=list)

    def add(self, reference: Any, candidate: Any) -> None:
        """Add a batch; quantized tensors are dequantized, complex ones are pairs of numbers."""
        expected, actual = _floating_parts(reference), _floating_parts(candidate)
        while len(self.sums) < max(len(expected), len(actual)):
            self.sums.append(_Sums())
        for index, sums in enumerate(self.sums):
            if index < len(expected) and index < len(actual):
                sums.add(expected[index], actual[index])
            else:
                sums.noise = math.nan

    def merge(self, other: Totals) -> None:
        """Add what another one has summed up; in the same order, the sums are the same."""
        while len(self.sums) < len(other.sums):
            self.sums.append(_Sums())
        for index, sums in enumerate(self.sums):
            if index < len(other.sums):
                sums.merge(other.sums[index])
            else:
                sums.noise = math.nan

    def fidelity(self) -> Fidelity | None:
        """None if there was no floating tensor."""
        if not self.sums:
            return None
        values = [sums.sqnr_db for sums in self.sums]
        worst = math.nan if any(map(math.isnan, values)) else min(values)
        count = sum(sums.count for sums in self.sums)
        noise = sum(sums.noise for sums in self.sums)
        return Fidelity(worst, noise / count if count else noise)


def db_text(value: float) -> str:
    """An SQNR for a table cell."""
    return "exact" if value == math.inf else f"{value:.1f}"


def sqnr_text(value: float | None) -> str:
    """An output's SQNR in words; None stands for no floating tensor."""
    if value is None:
        return "no floating tensor"
    return "equal in every value" if value == math.inf else f"SQNR {value:.1f} dB"


def _floating_parts(value: Any) -> list[Tensor]:
    return floating_tensors([as_real(tensor) for tensor in tensors_in(value)])


def floating_tensors(value: Any) -> list[Tensor]:
    """The floating tensors in a value, in order; quantized ones dequantized."""
    plain = [each.dequantize() if each.is_quantized else each for each in tensors_in(value)]
    return [tensor for tensor in plain if tensor.is_floating_point()]
