"""Linear layers whose weights are packed for another engine than the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_fx import LinearPackedParams
from qrecipe.execution.engine import engine
from qrecipe.model.addresses import site_of
from qrecipe.model.nodes import called_modules
from qrecipe.planning.plan import Engine


class PackedForEngine(LinearPackedParams):
    """What holds the packed weight of a linear layer, and packs it for an engine of its own.

    torch packs what is copied, unpickled or loaded from a state dict for the current engine.
    """

    def set_weight_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        own: Any = self.engine  # not declared, for TorchScript would not know the type
        with engine(own):
            super().set_weight_bias(weight, bias)

    def __setstate__(self, state: Mapping[str, Any]) -> None:  # of a copy, too
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.set_weight_bias(*self._weight_bias())


def pack_linear(layer: Any, own: Engine) -> None:
    """Pack a quantized linear layer for an engine, in place, now or when its weight comes."""
    keep_engine(layer, own)
    if isinstance(layer._packed_params._packed_params, torch.ScriptObject):
        layer.set_weight_bias(*layer._weight_bias())


def keep_engine(layer: Any, own: Engine) -> None:
    """Let a quantized linear layer be packed for an engine from now on, in place."""
    holder = layer._packed_params
    holder.__class__ = PackedForEngine
    holder.engine = own
    if own == "onednn":
        layer.register_forward_hook(_with_all_dimensions)


def keep_linear_engines(converted: fx.GraphModule, engines: Mapping[str, Engine]) -> None:
    """Do so at the sites that have an engine of their own."""
    for node, layer in called_modules(converted.graph):
        own = engines.get(site_of(node) or "")
        if own is not None and is_linear(layer):
            keep_engine(layer, own)


def _with_all_dimensions(_: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
    """The result in the shape of the input: onednn gives an empty one in two dimensions."""
    return result.reshape(*inputs[0].shape[:-1], result.shape[-1])


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a quantized linear layer."""
    return isinstance(getattr(layer, "_packed_params", None), LinearPackedParams)


def own_engines(converted: nn.Module) -> dict[nn.Module, Engine]:
    """What holds packed weights of linear layers with an engine of their own."""
    found: list[Any] = [each for each in converted.modules() if isinstance(each, PackedForEngine)]
    return {holder: holder.engine for holder in found}
