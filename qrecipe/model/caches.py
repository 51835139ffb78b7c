"""Caches that a model fills on its first call: attention biases, position grids, rotary tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import first_change, state_of, try_out
from qrecipe.model.nested import map_tensors, parts_of
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import random_numbers_kept


def with_caches_filled(model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """A copy of the model after its first call, if all that this call wrote is a cache.

    It is one if a second call writes nothing and returns the same, and if other values of the same
    shapes fill it with the same. None if nothing is written, or something else, or the model fails.
    """
    filled, other = runnable_copy(model), runnable_copy(model)
    try:
        with random_numbers_kept():
            output, cache = _call(filled, inputs, model)
            if not cache:
                return None
            output_again, written = _call(filled, inputs, model)
            if written or not _equal(output, output_again):
                return None
            _, cache_of_other = _call(other, _with_other_values(inputs), model)
    except Exception as error:
        raise_lack_of_memory(error)
        return None
    return filled if _equal(cache, cache_of_other) else None


def _call(probe: nn.Module, inputs: Inputs, owner: nn.Module) -> tuple[Any, Mapping[str, Any]]:
    """The output of a call, and what it wrote by name: only the class of what is not a value."""
    before = state_of(probe)
    output = try_out(probe, inputs.cloned(), owner)
    after = state_of(probe)
    names = (*after, *(name for name in before if name not in after))
    written = {}
    for name in names:
        was, now = ({name: state[name]} if name in state else {} for state in (before, after))
        if first_change(was, now) is not None:
            value, _ = now.get(name, (None, 0))
            written[name] = value if isinstance(value, _VALUES) else type(value)
    return output, written


_VALUES = (Tensor, bool, int, float, str)


def _with_other_values(inputs: Inputs) -> Inputs:
    """The inputs in another order, so that their values stay legal; half of those that are real."""

    def other(tensor: Tensor) -> Tensor:
        turned = tensor.flip(-1) if tensor.dim() else tensor.clone()
        return turned / 2 if turned.is_floating_point() else turned

    return Inputs(*map_tensors(other, (inputs.args, dict(inputs.kwargs))))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    parts, others = parts_of(a), parts_of(b)
    if isinstance(parts, Mapping) and isinstance(others, Mapping):
        same = parts.keys() == others.keys()
        return same and all(_equal(part, others[key]) for key, part in parts.items())
    return type(a) is type(b) and (not isinstance(a, _VALUES) or bool(a == b))
