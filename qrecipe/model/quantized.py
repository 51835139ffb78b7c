"""Whether a model or module is already quantized."""

from __future__ import annotations

from typing import Literal

from torch import nn

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase
from qrecipe._torch_fx import FloatFunctional, FXFloatFunctional, QuantizedEmbedding
from qrecipe.model.kept import PROVENANCE, kept

Became = Literal["static", "dynamic", "weight_only", "float", "leftover"]


def module_became(module: nn.Module) -> Became:
    """What a module became, by its class; ``leftover`` if conversion should have replaced it."""
    if isinstance(module, (FloatFunctional, FXFloatFunctional)):
        return "float"  # of functions, written for eager mode and not yet prepared
    inner = module[0] if isinstance(module, nn.Sequential) and len(module) else module
    path = _torch_path(module)
    if ".quantized.reference." in _torch_path(inner) or ".qat." in path:
        return "leftover"
    if ".quantized.dynamic." in path:
        return "dynamic"
    if isinstance(module, QuantizedEmbedding):
        return "weight_only"
    return "static" if ".quantized." in path else "float"


def _torch_path(module: nn.Module) -> str:
    """The torch module that defines a quantization class, or its base; empty for any other."""
    paths = (kind.__module__ for kind in type(module).__mro__)
    return next((path for path in paths if path.startswith("torch.ao.nn.")), "")


def quantized_part(model: nn.Module) -> str | None:
    """How a model shows that it is quantized or prepared already; None for a float model."""
    for path, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        what = f"{path} is a {kind}" if path else f"it is a {kind}"
        if isinstance(module, (ObserverBase, FakeQuantizeBase)):
            return f"is already prepared: {what}"
        if kind.startswith("torch.") and module_became(module) != "float":
            return f"is already quantized: {what}"
    found = kept(model, PROVENANCE)
    return found and f"is already quantized: by the recipe {found.fingerprint[:12]}"
