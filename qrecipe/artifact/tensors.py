"""Tensors as safetensors files hold them, without numpy."""

from __future__ import annotations

import torch

from qrecipe.artifact.container import DType

DTYPES: dict[DType, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""torch's dtypes by their safetensors names."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
