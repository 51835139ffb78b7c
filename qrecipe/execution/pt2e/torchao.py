"""The one door to torchao, which is optional."""

from __future__ import annotations

from importlib import import_module

from qrecipe._torch_ao import quiet
from qrecipe.process.state import unheard

with unheard(), quiet():  # it logs the kernels for GPUs that it cannot load
    import_module("torchao.quantization.pt2e.quantize_pt2e")

from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

__all__ = [
    "ObserverBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "prepare_pt2e",
]
