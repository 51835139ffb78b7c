"""Checks that kernels can work with the values of a model, and that none is NaN."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from qrecipe.audit.float_kernels import qparams_of_result
from qrecipe.execution.state import Slot
from qrecipe.model.graph_names import outer
from qrecipe.model.nodes import stored
from qrecipe.model.unfit import all_finite, must_be_finite
from qrecipe.rules.structure import joined

_ROLE = re.compile(r"(?:^|[._])(scale|zero_point)$")
_ACTIVATIONS = torch.quint8
"""The dtype of what torch's quantized kernels return."""

_FLOAT = torch.finfo(torch.float32)
_INTEGERS = 255
"""The most that two 8-bit integers differ by."""

Check = Callable[[Tensor], str | None]
"""Says what is wrong with the values of a tensor."""


class ValueChecks:
    """The checks for the state of a converted model."""

    def __init__(self, model: nn.Module) -> None:
        self._of_calls = {
            outer(joined(path, name)): check
            for path, module in model.named_modules()
            if isinstance(module, fx.GraphModule)
            for name, check in _checks_of_calls(module)
        }

    def problems(self, slot: Slot, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """What is wrong with the tensors of a slot."""
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                yield f"a truth value that is neither 0 nor 1 in {name}"
            check = self._of_calls.get(name) or _check(slot, name, tensors)
            if (found := check(tensor)) is not None:
                yield f"{found} in {name}"


def _checks_of_calls(graph_module: fx.GraphModule) -> Iterator[tuple[str, Check]]:
    """Those of the stored scales and zero points that quantizing calls read."""
    for node in graph_module.graph.nodes:
        is_quantize = node.target is torch.quantize_per_tensor or str(node.target).startswith(
            "quantized_decomposed."
        )
        if not (is_quantize or str(node.target).startswith("quantized.")):
            continue
        dtype = node.args[-1] if is_quantize else _ACTIVATIONS
        pair = node.args[1:3] if is_quantize else qparams_of_result(node)
        if all(isinstance(stored(source), Tensor) for source in pair):
            scale, zero_point = pair
            yield str(scale.target), _scale
            yield str(zero_point.target), partial(_zero_point, dtype)


def _check(slot: Slot, name: str, tensors: Mapping[str, Tensor]) -> Check:
    if not slot.is_kernels:
        return _finite if must_be_finite(slot.module, slot.attribute) else _not_nan
    role = _ROLE.search(name)
    if role is None:
        return _finite
    if role[1] == "scale":
        return _scale
    return partial(_zero_point, _dtype_of(slot, name, tensors))


def _dtype_of(slot: Slot, name: str, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the integers that a zero point belongs to."""
    integers = tensors.get(name.removesuffix("_zero_point"))
    if slot.kind == "packed" and integers is not None:
        return integers.dtype
    of_reference = slot.attribute.replace("zero_point", "dtype")
    dtype: torch.dtype = getattr(slot.module, of_reference, _ACTIVATIONS)
    return dtype


def _scale(scale: Tensor) -> str | None:
    scale = scale.float()  # as kernels read it
    if not bool(torch.isfinite(scale).all()):
        return "a scale that is not finite"
    if not bool((scale > 0).all()):
        return "a scale that is not positive"
    # kernels divide by it, and multiply it by integers
    is_usable = (scale >= _FLOAT.tiny) & (scale <= _FLOAT.max / _INTEGERS)
    return None if bool(is_usable.all()) else "a scale out of range: float32 has no room for values"


def _zero_point(dtype: torch.dtype, zero_point: Tensor) -> str | None:
    if zero_point.is_floating_point():  # of embeddings
        return None if all_finite(zero_point) else "a zero point that is not finite"
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if bool(((zero_point >= low) & (zero_point <= high)).all()):
        return None
    return f"a zero point outside {low}..{high}"


def _finite(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or all_finite(tensor):
        return None
    return "a value that is not finite"


def _not_nan(tensor: Tensor) -> str | None:
    """Masks and limits may be infinite."""
    if _finite(tensor) is None or not bool(tensor.isnan().any()):
        return None
    return "NaN"
