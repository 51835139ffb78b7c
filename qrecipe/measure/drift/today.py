"""Today's data for one stored range: its statistics, and the range that the observer finds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qrecipe.errors.text import first_line
from qrecipe.measure.drift.distribution import Distribution
from qrecipe.measure.drift.report import SiteDrift
from qrecipe.measure.drift.stored_ranges import QRange, StoredRange
from qrecipe.observers.loading import load
from qrecipe.observers.merging import Subject
from qrecipe.observers.qconfig import factory
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import Constructor, TensorSpec, quantized_range


class Tally:
    """Sums over batches for one tensor."""

    def __init__(self, stored: StoredRange) -> None:
        self.stored = stored
        self._values = Distribution()
        self._count = 0
        self._clipped = 0
        self._outside = 0
        self._is_bound = False

    def add(self, value: Tensor) -> None:
        """Count the float values of a batch, as far as they are read."""
        value = self.stored.read(value)
        self._count_values(value)
        self._clipped += int(self.stored.possible.outside(value).sum())
        self._outside += int(self.stored.calibrated.outside(value).sum())

    def add_rounded(self, kept: Tensor) -> None:
        """Count the kernel's own results for a batch, if its float counterpart is not known."""
        self._is_bound = True
        self._count_values(kept)
        clipped = self.stored.possible.at_ends(kept)
        self._clipped += int(clipped.sum())
        self._outside += int((clipped | self.stored.calibrated.outside(kept)).sum())

    def _count_values(self, values: Tensor) -> None:
        self._values.add(values)
        self._count += values.numel()

    def merge(self, other: Tally) -> None:
        """Add the sums of the same tensor on another rank."""
        self._values.merge(other._values)
        self._count += other._count
        self._clipped += other._clipped
        self._outside += other._outside
        self._is_bound |= other._is_bound

    def result(self, now: QRange | None, position: int) -> SiteDrift:
        """The result; ``now`` is the range of today's data, ``position`` that of the tensor."""
        site, stored = self.stored.site, self.stored.calibrated
        after = None if now is None else self.stored.with_all_integers(now)
        count = max(1, self._count)
        return SiteDrift(
            name=site.name,
            op=site.op,
            tensor=self.stored.role if position == 1 else f"{self.stored.role} {position}",
            dtype=str(self.stored.spec.dtype),
            stored=stored,
            now=now,
            values=self._values.histogram(),
            is_finite=self._values.is_finite,
            clipped=self._clipped / count,
            clipped_after=0.0 if after is None else self._values.share(after.outside),
            outside=self._outside / count,
            is_bound=self._is_bound,
            sqnr_db=self._sqnr_db(self.stored.possible),
            sqnr_after_db=self._sqnr_db(after),
        )

    def _sqnr_db(self, kernel: QRange | None) -> float | None:
        if kernel is None or self._is_bound:
            return None
        return self._values.sqnr_db(kernel.rounded)


class Observing:
    """Makes observers; ``missing`` has the names of unavailable ones, and why."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def observer(self, spec: TensorSpec) -> Watch:
        """The observer of a spec, or one of minimum and maximum if it is not available."""
        try:
            if spec.observer is not None:
                load("observer", spec.observer.name)
            return Watch(factory(spec, "ptq")(), spec)
        except Exception as error:
            raise_lack_of_memory(error)
            name = "placeholder" if spec.observer is None else spec.observer.name
            self.missing[name] = first_line(error)
        plain = spec.model_copy(update={"observer": Constructor(name="minmax")})
        return Watch(factory(plain, "ptq")(), spec)


class Watch:
    """One observer and what it has found.

    A moving average weighs all batches equally: the value that it would converge to.
    """

    def __init__(self, observer: Any, spec: TensorSpec) -> None:
        self._observer = observer
        self._spec = spec
        self._seen = 0
        self._failed = False

    def subject(self) -> Subject:
        """The observer, to be merged with those of other ranks."""
        return Subject(type(self._observer).__name__, self._observer, self._observer, self.see)

    def restart(self, calls: int = 0) -> None:
        """Count on from so many calls."""
        self._seen = calls

    def see(self, value: Tensor) -> None:
        """Observe the values of one batch; empty batches are ignored."""
        if not value.numel():
            return
        self._seen += 1
        if hasattr(self._observer, "averaging_constant"):
            self._observer.averaging_constant = 1 / self._seen
        try:
            self._observer(value.detach().float())
        except Exception as error:
            raise_lack_of_memory(error)
            self._failed = True

    def range(self) -> QRange | None:
        """The range that it gives now; None if that is not valid."""
        limits = quantized_range(self._spec)
        if self._failed or not self._seen or limits is None:
            return None
        try:
            scale, zero_point = self._observer.calculate_qparams()
            step, zero = float(scale), int(zero_point)
        except Exception as error:
            raise_lack_of_memory(error)
            return None
        if not (math.isfinite(step) and step > 0 and torch.isfinite(scale).all()):
            return None
        return QRange.of(step, zero, limits)
