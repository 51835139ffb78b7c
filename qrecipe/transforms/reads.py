"""What layers read while batches run: the range of each channel, and some rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.process import ranks

_BATCHES, _ROWS = 16, 16
"""The number of batches of which rows are kept, and of rows for each."""


@dataclass(slots=True)
class Read:
    """What a layer reads: the extremes of each channel, [channels], and rows, [..., channels]."""

    keeps_rows: bool
    extremes: tuple[Tensor, Tensor] | None = None
    rows: list[Tensor] = field(default_factory=list)

    def see(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what a layer of torch with a single input is called with into account."""
        (x,) = (*args, *kwargs.values())
        axis = x.dim() + 1 - layer.weight.dim()  # without the dimensions of an image
        if not x.numel():
            return
        flat = x.detach().movedim(axis, -1).reshape(-1, x.shape[axis])
        low, high = flat.amin(0), flat.amax(0)
        if self.extremes is not None:
            low, high = low.minimum(self.extremes[0]), high.maximum(self.extremes[1])
        self.extremes = low, high
        if self.keeps_rows and len(self.rows) < _BATCHES:
            self.rows.append(flat[:: max(1, len(flat) // _ROWS)][:_ROWS].clone())

    @property
    def largest(self) -> Tensor | None:
        """The largest absolute value of each channel, None if nothing was read. [channels]"""
        if self.extremes is None:
            return None
        low, high = self.extremes
        return low.abs().maximum(high.abs())


@contextmanager
def reads_of(
    model: nn.Module, paths: Sequence[str], *, keep_rows: bool = False
) -> Iterator[Mapping[str, Read]]:
    """Note what some layers of one of our models read inside a ``with``, by their paths."""
    seen = {path: Read(keep_rows) for path in paths}
    with ExitStack() as hooks:
        for path, read in seen.items():
            layer = model.get_submodule(path)
            hooks.enter_context(layer.register_forward_pre_hook(read.see, with_kwargs=True))
        yield seen


def of_all_ranks(seen: Mapping[str, Read]) -> Mapping[str, Read]:
    """What all ranks saw. Raises ``CalibrationError`` (QR409) if one of them failed."""
    found = ranks.gathered("what layers read", lambda: list(seen.values()))
    return {path: _merged(own) for path, own in zip(seen, zip(*found, strict=True), strict=True)}


def _merged(reads: Sequence[Read]) -> Read:
    """As one process would have seen it, which takes the ranks' batches in turn."""
    ends = [read.extremes for read in reads if read.extremes is not None]
    if not ends:
        return reads[0]
    low, high = (torch.stack(each) for each in zip(*ends, strict=True))
    turns = zip_longest(*(read.rows for read in reads))
    rows = [each for turn in turns for each in turn if each is not None]
    return Read(reads[0].keeps_rows, (low.amin(0), high.amax(0)), rows[:_BATCHES])
