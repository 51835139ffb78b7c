"""Copies of a model's structure that share its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

from torch import Tensor, nn

from qrecipe.errors import Finding, PlanError

_Model = TypeVar("_Model", bound=nn.Module)


def structural_copy(model: _Model) -> _Model:
    """A deep copy of the modules that shares every parameter and buffer with ``model``.

    Raises ``PlanError`` (QR306) where the model cannot be copied.
    """
    return _copy_sharing(model, chain(model.parameters(), model.buffers()))


def runnable_copy(model: _Model) -> _Model:
    """A copy in eval mode whose forward may be run: it shares the parameters, not the buffers.

    A forward may write into a buffer. Raises ``PlanError`` (QR306) as `structural_copy` does.
    """
    return _copy_sharing(model, model.parameters()).eval()


def _copy_sharing(model: _Model, tensors: Iterable[Tensor]) -> _Model:
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise PlanError(
            Finding(
                "QR306",
                f"the model cannot be copied: {error}",
                hint="make it survive copy.deepcopy; quantization works on a copy of it",
            )
        ) from error
