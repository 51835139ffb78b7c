"""What the kernels of dynamic and weight-only modules should give, by float arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrecipe._torch_fx import DynamicLinear, DynamicLinearReLU, QuantizedEmbedding
from qrecipe.inputs import Inputs
from qrecipe.schema import Backend

_LEAST_SCALE = 1e-12


def expected_output(kernel: nn.Module, inputs: Inputs, backend: Backend) -> Tensor | None:
    """What a module should give: its rounded weight on its input, rounded too where dynamic.

    None for what cannot be said: recurrent modules round anew at every step.
    """
    operands = [*inputs.args, *inputs.kwargs.values()]
    if len(operands) != 1 or not isinstance(operands[0], Tensor) or not operands[0].numel():
        return None
    x, module = operands[0], _untyped(kernel)
    if type(kernel) is QuantizedEmbedding:
        return F.embedding(x, module.weight().dequantize())
    if not isinstance(kernel, DynamicLinear):
        return None
    weight: Tensor = module.weight()
    if weight.is_quantized:
        x, weight = _rounded(x, 8 if backend == "qnnpack" else 7), weight.dequantize()
    y = F.linear(x, weight, module.bias())
    return F.relu(y) if isinstance(kernel, DynamicLinearReLU) else y


def _untyped(module: nn.Module) -> Any:
    return module


def _rounded(x: Tensor, bits: int) -> Tensor:
    """As the dynamic kernels round it: affine, over the range of this very tensor."""
    most = 2**bits - 1
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / most, _LEAST_SCALE)
    zero_point = min(round(-low / scale), most)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
