"""The rounded weights of a reference conversion, computed fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe._torch_fx import ReferenceQuantizedModule

_INTEGERS = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


@contextmanager
def rounding_weights_fast(reference: nn.Module) -> Iterator[None]:
    """Make reference modules compute their rounded weight by `rounded_weight` inside a ``with``.

    torch's own quantize and dequantize per channel take five times as long, and a reference
    module repeats them at every call.
    """
    patched = [
        module
        for module in reference.modules()
        if isinstance(module, ReferenceQuantizedModule) and _has_one_integer_weight(module)
    ]
    for module in patched:
        vars(module)["get_weight"] = partial(rounded_weight, module)
    try:
        yield
    finally:
        for module in patched:
            del vars(module)["get_weight"]


def _has_one_integer_weight(module: Any) -> bool:
    """Recurrent modules have several weights, embeddings a floating zero point."""
    return (
        isinstance(getattr(module, "weight_scale", None), Tensor)
        and module.weight_dtype in _INTEGERS
        and module.weight_qscheme != torch.per_channel_affine_float_qparams
    )


def rounded_weight(module: Any) -> Tensor:
    """What the module's ``get_weight`` returns: the weight on the grid of its scale."""
    return _on_grid(module.weight.detach(), module)


def quantized_weight(module: Any, weight: Tensor) -> Tensor:
    """A float weight as the reference module rounds its own."""
    if _has_one_integer_weight(module):
        return _on_grid(weight.detach(), module)
    rounded: Tensor = module.get_weight()
    return rounded


def _on_grid(weight: Tensor, module: Any) -> Tensor:
    scale, zero_point = module.weight_scale, module.weight_zero_point
    if module.weight_qscheme in (torch.per_channel_affine, torch.per_channel_symmetric):
        shape = [-1 if axis == module.weight_axis_int else 1 for axis in range(weight.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    integers = torch.iinfo(_INTEGERS[module.weight_dtype])
    steps: Tensor = (weight / scale).round_().add_(zero_point).clamp_(integers.min, integers.max)
    steps.sub_(zero_point).mul_(scale)
    return steps
