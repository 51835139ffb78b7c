"""A session as a model: of any size of batch, with outputs as the model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.errors.text import counted
from qrecipe.model.call import Inputs, bound
from qrecipe.model.nested import map_tensors, tensors_in
from qrecipe.runtimes.session import Session


class Served(nn.Module):
    """A session that takes what ``model`` takes, and gives the tensors of ``template`` in order.

    With a ``step``, batches are run in pieces of that size, the last one filled up. Results are
    copied, since some runtimes write the next ones over them.
    """

    def __init__(
        self, session: Session, model: nn.Module, template: Any, step: int | None = None
    ) -> None:
        super().__init__()
        self._session = session
        self._canonical = partial(canonical, model)
        self._template = template
        self._step = step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._canonical(Inputs(args, kwargs))
        size, step = inputs.batch_size, self._step
        if not size or not step or size == step:
            return self._shaped(self._run(inputs))
        starts = range(0, size, step)
        pieces = [self._run(inputs.taken(torch.arange(at, at + step) % size)) for at in starts]
        return self._shaped([torch.cat(each)[:size] for each in zip(*pieces, strict=True)])

    def _run(self, inputs: Inputs) -> list[Tensor]:
        return [each.clone() for each in tensors_in(self._session.run(inputs.cloned()))]

    def _shaped(self, found: Sequence[Tensor]) -> Any:
        expected = len(list(tensors_in(self._template)))
        if len(found) != expected:
            tensors = counted(len(found), "tensor")
            raise ValueError(f"it returns {tensors}, the model {expected}")
        remaining = iter(found)
        return map_tensors(lambda _: next(remaining), self._template)


def canonical(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same call with arguments by position, as far as the signature allows it.

    Files take tensors in this order. Raises ``PlanError`` (QR307) if the inputs do not fit.
    """
    given = bound(model, inputs)
    return Inputs(given.args, given.kwargs)
