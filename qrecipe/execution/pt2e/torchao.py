"""The one door to torchao, which is optional."""

from __future__ import annotations

import logging
from importlib import import_module

from qrecipe._torch_ao import quiet


def _import_quietly() -> None:
    """torchao logs the kernels for GPUs that it cannot load."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet():
            import_module("torchao.quantization.pt2e.quantize_pt2e")
    finally:
        logging.disable(disabled)


_import_quietly()

from torchao.quantization.pt2e import ObserverBase  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import (  # noqa: E402
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
