"""The caller's batches run through models, and the calls recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.execution.batches import Forward, run_batch, unusable_batch
from qrecipe.model.call import Inputs


def run_quietly(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    """Run the model on a batch, without gradients. Raises as `loaders.run_batch` does."""
    with torch.no_grad(), quiet():
        run_batch(model, batch, index, forward)


def calls_of(
    model: nn.Module, batch: Any, index: int, forward: Forward | None = None
) -> list[Sample]:
    """Each call of the model for one batch, in order. Raises as `loaders.run_batch` does."""
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
