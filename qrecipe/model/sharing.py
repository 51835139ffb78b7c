"""Modules on the tensors of others, whose memory they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def with_tensors(module: _Module, tensors: Mapping[str, Tensor | None]) -> _Module:
    """The module itself, with these parameters and buffers; None is for no parameter."""
    for name, tensor in tensors.items():
        if name in module._buffers:
            module.register_buffer(name, tensor)
            continue
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), tensor.requires_grad)
        module.register_parameter(name, tensor)
    return module


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer in eval mode of a weight (outputs, inputs) and a bias (outputs)."""
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias is not None, device="meta").eval()
    return with_tensors(made, {"weight": weight, "bias": bias})
