"""Dynamic linear layers that scale the channels of their input first, by a product in float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qrecipe._torch_fx import DynamicLinear
from qrecipe.model.scaled_input import ScaledLinear, scale_input


class ScaledDynamicLinear(DynamicLinear):
    """torch's dynamic linear layer of ``x * input_factor``. [in_features]"""

    input_factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x * self.input_factor)  # type: ignore[no-untyped-call]
        return y


def take_scales(model: nn.Module) -> Mapping[str, Tensor]:
    """Turn scaled layers into plain ones, in place; returns their factors by path."""
    factors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, ScaledLinear):
            factors[path] = module.input_factor
            scale_input(module, 1 / module.input_factor)
    return factors


def give_scales(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Let the layers at these paths scale their input, quantized or not, in place."""
    for path, factor in factors.items():
        module: Any = model.get_submodule(path)
        is_dynamic = isinstance(module, DynamicLinear)
        module.__class__ = ScaledDynamicLinear if is_dynamic else ScaledLinear
        module.register_buffer("input_factor", factor)
