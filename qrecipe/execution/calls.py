"""The caller's batches run through models, and the calls recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.execution.batches import (
    Forward,
    check_finite,
    known_length,
    limited,
    rereadable,
    run_batch,
    unusable_batch,
)
from qrecipe.model.call import Inputs
from qrecipe.terminal.progress import Progress, chosen_progress, tracked


@dataclass(slots=True)
class Feed:
    """The caller's batches, ``limit`` of them at most, and how models are called with them."""

    batches: Iterable[Any]
    forward: Forward | None = None
    limit: int | None = None
    progress: Progress | bool | None = False

    @property
    def count(self) -> int | None:
        """The number of batches, if it is known."""
        return known_length(self.batches, self.limit)

    def __iter__(self) -> Iterator[Any]:
        return limited(self.batches, self.limit)

    def numbered(self, label: str) -> Iterator[tuple[int, Any]]:
        """The batches and their index; ``label`` says on a terminal what they are for."""
        show = chosen_progress(self.progress, label)
        return tracked(self, show, self.count)

    def runs(self, model: nn.Module, label: str) -> Iterator[None]:
        """Run a batch through a model in each step. Raises as `run_quietly` and `check_finite`."""
        for index, batch in self.numbered(label):
            check_finite(batch, index)
            run_quietly(model, batch, index, self.forward)
            yield

    def hold(self) -> None:
        """Keep batches that come only once, to run them again."""
        self.batches = rereadable(self.batches, self.limit)


def run_quietly(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    """Run the model on a batch, without gradients. Raises as `run_batch` does."""
    with torch.no_grad(), quiet():
        run_batch(model, batch, index, forward)


def calls_of(
    model: nn.Module, batch: Any, index: int, forward: Forward | None = None
) -> list[Sample]:
    """Each call of the model for one batch, in order. Raises as `run_batch` does."""
    with noted_calls(model) as calls:
        run_quietly(model, batch, index, forward)
    if not calls:
        raise unusable_batch(batch, index, "forward did not call the model")
    return calls


@contextmanager
def noted_calls(model: nn.Module) -> Iterator[list[Sample]]:
    """The calls of one of our models inside the ``with``."""
    calls: list[Sample] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Sample(Inputs(args, kwargs), output))

    with model.register_forward_hook(note, with_kwargs=True):
        yield calls
