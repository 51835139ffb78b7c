"""Linear layers made of the parameters that another layer holds."""

from __future__ import annotations

from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer on the memory of a weight (outputs, inputs) and a bias (outputs)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta").eval()
    made.weight = _parameter(weight)
    if bias is not None:
        made.bias = _parameter(bias)
    return made


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), tensor.requires_grad)
