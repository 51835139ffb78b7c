"""How much memory a model's tensors take, including packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.model.nested import leaves, tensors_in


def model_size(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers and packed weights; shared storage counts once.

    Packed weights count as they are stored in a checkpoint: the quantized values, the scale and
    zero point of each channel, and the bias. A kernel's own padding is not included.
    """
    tensors = [*model.parameters(), *model.buffers()]
    sizes = [(tensor, tensor.untyped_storage().nbytes()) for tensor in tensors]
    for module in model.modules():
        for value in vars(module).values():
            sizes += _packed(value)
    # the list keeps all tensors alive, so that each address is one storage
    return sum({tensor.untyped_storage().data_ptr(): size for tensor, size in sizes}.values())


def _packed(value: Any) -> Iterator[tuple[Tensor, int]]:
    """The tensors inside torch's packed weights and their bytes; nothing for any other value."""
    if isinstance(value, torch.ScriptObject) and hasattr(value, "__getstate__"):
        state = value.__getstate__()
        is_linear = "LinearPackedParams" in str(value)
        for tensor in tensors_in(state):
            if tensor.is_quantized:
                yield from _quantized(tensor)
            elif tensor.is_floating_point():
                # a packed linear weight is int8 or float16, which unpacks as float32
                is_half = is_linear and tensor.dim() > 1
                yield tensor, tensor.untyped_storage().nbytes() // (2 if is_half else 1)
        for inner in leaves(state):
            yield from _packed(inner)


def _quantized(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    parts = [tensor]
    if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        parts += [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    for part in parts:
        yield part, part.untyped_storage().nbytes()
