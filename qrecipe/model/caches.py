"""Caches that a model fills on its first call: attention biases, position grids, rotary tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qrecipe.errors.text import shown_names
from qrecipe.model.call import Inputs
from qrecipe.model.copies import (
    on_meta,
    runnable_copy,
    structural_copy,
    without_weights,
    zeros_like,
)
from qrecipe.model.dry_run import changed, state_of, try_out
from qrecipe.model.nested import leaves, map_leaves, map_tensors, parts_of
from qrecipe.model.record import TracedPart
from qrecipe.model.shapes import MOST_OPERATIONS, TOO_MANY_OPERATIONS, without_values
from qrecipe.model.unfit import unfit
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import random_numbers_kept
from qrecipe.process.warnings import filters_kept


def with_caches_filled(model: nn.Module, inputs_of: Mapping[str, Inputs]) -> nn.Module | None:
    """A copy of the model after the first call of some parts, if all that they wrote is a cache.

    ``inputs_of`` has the inputs of the parts by path, which is empty for the model. It is a cache
    if a second call writes nothing and returns the same, and if other values of the same shapes
    fill it with the same. None if nothing is written, or something else, or the model fails.

    Raises ``PlanError`` (QR306) for layers that are made on the first call with random weights.
    """
    filled, other = runnable_copy(model), runnable_copy(model)
    try:
        with random_numbers_kept():
            output, cache = _call(filled, inputs_of, model)
            if not cache:
                return None
            output_again, written = _call(filled, inputs_of, model)
            if written or not _equal(output, output_again):
                return None
            others = {path: _with_other_values(given) for path, given in inputs_of.items()}
            _, cache_of_other = _call(other, others, model)
    except Exception as error:
        raise_lack_of_memory(error)
        return None
    if _equal(cache, cache_of_other):
        return filled
    known = dict(model.named_modules())
    made = [path for path, _ in filled.named_modules() if path not in known]
    if made:
        message = f"forward makes layers with random weights on its first call: {shown_names(made)}"
        raise unfit(message, "run the model once on an example first")
    return None


def _call(
    probe: nn.Module, inputs_of: Mapping[str, Inputs], owner: nn.Module
) -> tuple[Any, Mapping[str, Any]]:
    """The outputs of calls, and what they wrote by name: values, or classes of other objects."""
    before = state_of(probe)
    output = {
        path: try_out(probe.get_submodule(path), inputs.cloned(), owner)
        for path, inputs in inputs_of.items()
    }
    after = state_of(probe)
    values = {name: after.get(name, (None, 0))[0] for name in changed(before, after)}
    written = {
        name: value if isinstance(value, _VALUES) else type(value) for name, value in values.items()
    }
    return output, written


_VALUES = (Tensor, bool, int, float, str)


def _with_other_values(inputs: Inputs) -> Inputs:
    """The inputs in another order, so that their values stay legal; half of those that are real."""

    def other(tensor: Tensor) -> Tensor:
        turned = tensor.flip(-1) if tensor.dim() else tensor.clone()
        return turned / 2 if turned.is_floating_point() else turned

    return inputs.mapped(other)


def with_caches_without_values(model: nn.Module, parts: Sequence[TracedPart]) -> nn.Module | None:
    """A copy of the model with what a first call of the parts would write, as zeros.

    The parts run on the meta device, with the shapes of the example. None if they cannot, or write
    nothing.
    """
    probe = on_meta(model)
    before = _attributes(probe)
    if not _could_run(probe, parts):
        return None
    written = {
        place: value
        for place, value in _attributes(probe).items()
        if place not in before or not _same(before[place], value)
    }
    if not written:
        return None
    filled = runnable_copy(model)
    for (path, registry, name), value in written.items():
        module = filled.get_submodule(path)
        held = module._buffers if registry else vars(module)
        held[name] = map_tensors(zeros_like, value)
    return filled


def with_layers_made(model: nn.Module, parts: Sequence[TracedPart]) -> nn.Module | None:
    """A copy of the model with the layers that a first call of the parts would make, or None.

    The parts run as in `with_caches_without_values`. Lazy layers get their shapes.
    """
    probe = on_meta(model)
    if not _could_run(probe, parts):
        return None
    kinds = {path: type(module) for path, module in model.named_modules()}
    made = {path: each for path, each in probe.named_modules() if kinds.get(path) is not type(each)}
    filled = structural_copy(model)
    for path, layer in made.items():
        owner, _, name = path.rpartition(".")
        if owner not in made:
            setattr(filled.get_submodule(owner), name, without_weights(layer))
    return filled if made else None


def _could_run(probe: nn.Module, parts: Sequence[TracedPart]) -> bool:
    """Whether the parts of a model without values ran with the shapes of the example."""
    try:
        # torch imports sympy for shapes that do not fit
        with (
            torch.no_grad(),
            torch.device("meta"),
            _Limited(),
            random_numbers_kept(),
            filters_kept(),
        ):
            for part in parts:
                probe.get_submodule(part.path)(**part.constants, **without_values(part.shapes))
    except Exception as error:
        raise_lack_of_memory(error)
        return False
    return True


class _Limited(TorchFunctionMode):
    """Raises ``RuntimeError`` after `shapes.MOST_OPERATIONS`."""

    def __init__(self) -> None:
        super().__init__()
        self._operations = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise RuntimeError(TOO_MANY_OPERATIONS)
        return func(*args, **(kwargs or {}))


def _attributes(model: nn.Module) -> dict[tuple[str, bool, str], Any]:
    """Attributes of modules, and their buffers (True), as copies of the containers."""
    return {
        (path, values is module._buffers, name): map_leaves(lambda leaf: leaf, value)
        for path, module in model.named_modules()
        for values in (vars(module), module._buffers)
        for name, value in values.items()
        if name not in _OF_EVERY_MODULE
    }


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _same(a: Any, b: Any) -> bool:
    one, other = list(leaves(a)), list(leaves(b))
    return len(one) == len(other) and all(
        x is y or (isinstance(x, (bool, int, float, str)) and _equal(x, y))
        for x, y in zip(one, other, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    parts, others = parts_of(a), parts_of(b)
    if isinstance(parts, Mapping) and isinstance(others, Mapping):
        same = parts.keys() == others.keys()
        return same and all(_equal(part, others[key]) for key, part in parts.items())
    return type(a) is type(b) and (not isinstance(a, _VALUES) or bool(a == b))
