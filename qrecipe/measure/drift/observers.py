"""The observers of calibration, fed with today's data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qrecipe.errors.text import first_line
from qrecipe.measure.drift.stored_ranges import QRange
from qrecipe.observers.loading import load
from qrecipe.observers.qconfig import factory
from qrecipe.recipe.schema import Constructor, TensorSpec, quantized_range


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

    def see(self, value: Tensor) -> None:
        """Observe the values of one batch; empty batches are ignored."""
        if not value.numel():
            return
        self._seen += 1
        if hasattr(self._observer, "averaging_constant"):
            self._observer.averaging_constant = 1 / self._seen
        try:
            self._observer(value.detach().float())
        except Exception:
            self._failed = True

    def range(self) -> QRange | None:
        """The range that it gives now; None if that is not valid."""
        limits = quantized_range(self._spec)
        if self._failed or not self._seen or limits is None:
            return None
        try:
            scale, zero_point = self._observer.calculate_qparams()
            step, zero = float(scale), int(zero_point)
        except Exception:
            return None
        if not (math.isfinite(step) and step > 0 and torch.isfinite(scale).all()):
            return None
        return QRange.of(step, zero, limits)
