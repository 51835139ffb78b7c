"""One batch and its output: the sample that the audit runs on."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from qrecipe.audit.sqnr import floating_tensors
from qrecipe.model.call import Inputs, batch_size, first_of
from qrecipe.model.nested import UncopyableError, map_tensors

JUDGEABLE_DB = 15.0
"""Below this, an output says nothing about kernels: the reference is as far from float itself."""

RIGHT_DB = 30.0
"""Below this, two modules, or a kernel and its reference, compute different things."""

TOLERANCE_DB = 1.0

CAUSE_DB = 20 * math.log10(2)
"""What accounts for at least half of an error is reported as its cause."""

HEAD_SAMPLES = 4
"""So many samples of the first batch usually prove a model; if not, the whole batch is used."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch and the output of the prepared (float) model."""

    inputs: Inputs
    output: Any

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> Sample:
        """The inputs, and what a model gives for them."""
        with torch.no_grad():
            return cls(inputs, inputs.call(model))

    def head(self) -> Sample | None:
        """The first samples with their part of the output; None if the output cannot be cut."""
        first = first_of(self.inputs, self.output, HEAD_SAMPLES)
        return None if first is None else Sample(*first)

    def on_head(self, judge: Callable[[Sample], _Found]) -> _Found:
        """What a function gives for the first samples, or for all of them if it needs them.

        A model that is given the size of its batch as a number only takes the whole of it.
        """
        head = self.head()
        if head is not None:
            with suppress(Exception):
                return judge(head)
        return judge(self)

    def extremes(self) -> Sample | None:
        """The samples with the lowest and the highest output; None if they cannot be told."""
        size, outputs = self.inputs.batch_size, floating_tensors(self.output)
        if size is None or not outputs or batch_size(self.output) != size or not outputs[0].numel():
            return None
        rows = outputs[0].detach().reshape(size, -1)
        chosen = torch.stack([rows.amin(1).argmin(), rows.amax(1).argmax()])
        try:
            return Sample(self.inputs.taken(chosen), map_tensors(lambda x: x[chosen], self.output))
        except UncopyableError:
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        # it is kept in the model's meta, and a copy of the model needs no copy of the data
        return self
