"""What torch's BackendConfig says of the kernels of an operation, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qrecipe.rules.structure import Mode

_DTYPES: Mapping[torch.dtype, str] = {
    torch.qint8: "int8",
    torch.quint8: "uint8",
    torch.quint4x2: "uint4",
    torch.qint32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float16: "float16",
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """What a kernel wants of a tensor, as recipes name it; None where it wants nothing.

    ``dtype`` is None for float32 too. ``low`` and ``high`` bound the integers, ``least_scale`` the
    scale; ``scale`` and ``zero_point`` are the only ones that it takes.
    """

    dtype: str | None
    low: int | None
    high: int | None
    least_scale: float | None
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True, slots=True)
class KernelTypes:
    """The tensors of one kernel."""

    mode: Mode
    input: TensorType
    weight: TensorType
    output: TensorType


def kernel_types(dtype_configs: Iterable[Any]) -> tuple[KernelTypes, ...]:
    """What torch's ``DTypeConfig`` values say, in their order."""
    return tuple(
        KernelTypes(
            _mode(config),
            _tensor_type(config.input_dtype_with_constraints),
            _tensor_type(config.weight_dtype_with_constraints),
            _tensor_type(config.output_dtype_with_constraints),
        )
        for config in dtype_configs
    )


def _mode(config: Any) -> Mode:
    if config.is_dynamic:
        return "dynamic"
    return "weight_only" if config.input_dtype == torch.float32 else "static"


def _tensor_type(wanted: Any) -> TensorType:
    return TensorType(
        _DTYPES.get(wanted.dtype),
        wanted.quant_min_lower_bound,
        wanted.quant_max_upper_bound,
        wanted.scale_min_lower_bound,
        wanted.scale_exact_match,
        wanted.zero_point_exact_match,
    )
