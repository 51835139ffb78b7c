"""Tensors <-> the bytes of a safetensors file, without numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import torch
from torch import Tensor

from qrecipe.artifact.container import DType, Entry, with_header

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

STORABLE = frozenset(DTYPES.values())
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A complete file, with a checksum in its metadata.

    The tensors must be contiguous, on the CPU and of a dtype in ``STORABLE``.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps all aligned
    content = b"".join(bytes_of(tensors[name]) for name in names)
    return with_header(dict(_entries({name: tensors[name] for name in names})), metadata, content)


def _entries(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Entry]]:
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        shape = tuple(tensor.shape)
        yield name, Entry(dtype=_NAMES[tensor.dtype], shape=shape, data_offsets=(start, end))
        start = end


def deserialized(content: bytes) -> dict[str, Tensor]:
    """The tensors of a complete file, each in its own memory.

    Raises ValueError if the library cannot read it.
    """
    try:
        table: Any = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    return {name: _tensor(found["dtype"], found["shape"], found["data"]) for name, found in table}


def bytes_of(tensor: Tensor) -> bytes:
    """The memory of a contiguous tensor."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def _tensor(dtype: DType, shape: list[int], data: bytes) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)
