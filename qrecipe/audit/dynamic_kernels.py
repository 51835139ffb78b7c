"""What the kernels of dynamic and weight-only modules should return, in float arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qrecipe._torch_fx import DynamicLinear, QuantizedEmbedding
from qrecipe.model.call import Inputs
from qrecipe.recipe.schema import Backend

_LEAST_SCALE = 1e-12


def expected_output(
    kernel: nn.Module, compute: Callable[[Tensor], Any], inputs: Inputs, backend: Backend
) -> Tensor | None:
    """What a module should return: ``compute`` on its input, which is rounded if it is dynamic.

    ``compute`` is float arithmetic with the rounded weight. None for recurrent modules, which
    round again at every step.
    """
    operands = [*inputs.args, *inputs.kwargs.values()]
    if len(operands) != 1 or not isinstance(operands[0], Tensor) or not operands[0].numel():
        return None
    x = operands[0]
    if isinstance(kernel, DynamicLinear) and _weight(kernel).is_quantized:
        x = _rounded(x, 8 if backend == "qnnpack" else 7)
    elif not isinstance(kernel, (DynamicLinear, QuantizedEmbedding)):
        return None
    expected: Tensor = compute(x)
    return expected


def with_weight_of(kernel: nn.Module, own: nn.Module, x: Tensor) -> Any:
    """What a float module computes with the kernel's rounded weight."""
    weight: Any = own.weight
    return functional_call(own, {"weight": _on_grid_of(_weight(kernel), weight.detach())}, (x,))


def _weight(kernel: Any) -> Tensor:
    weight: Tensor = kernel.weight()
    return weight


def _on_grid_of(stored: Tensor, weight: Tensor) -> Tensor:
    if not stored.is_quantized:
        return weight.half().float()
    if str(stored.qscheme()).startswith("torch.per_channel"):
        quantized = torch.quantize_per_channel(
            weight,
            stored.q_per_channel_scales(),
            stored.q_per_channel_zero_points(),
            stored.q_per_channel_axis(),
            stored.dtype,
        )
    else:
        quantized = torch.quantize_per_tensor(
            weight, stored.q_scale(), stored.q_zero_point(), stored.dtype
        )
    return quantized.dequantize()


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Round as dynamic kernels do: affine, over the range of the tensor itself."""
    most = 2**bits - 1
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / most, _LEAST_SCALE)
    zero_point = min(round(-low / scale), most)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
