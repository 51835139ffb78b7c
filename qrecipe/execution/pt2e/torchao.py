"""The one door to torchao, which is optional."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import assert_and_get_unique_device
from qrecipe.process.state import unheard
from qrecipe.process.warnings import import_aside

with unheard(), quiet():  # it logs the kernels for GPUs that it cannot load
    import_aside("torchao.quantization.pt2e.quantize_pt2e")

from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.utils import _assert_and_get_unique_device

__all__ = [
    "ObserverBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "models_forgotten",
    "prepare_pt2e",
]


@contextmanager
def models_forgotten() -> Iterator[None]:
    """Let torchao, and what it uses of torch, forget the models that they are given inside.

    Both look up the device of each through ``functools.cache``, which would keep it forever.
    """
    try:
        yield
    finally:
        _assert_and_get_unique_device.cache_clear()
        assert_and_get_unique_device.cache_clear()
