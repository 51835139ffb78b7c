"""What tells two models or batches apart: a digest of all that is in them."""

from __future__ import annotations

import ctypes
import hashlib
import pickle
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.model.nested import parts_of

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def model_digest(model: nn.Module) -> str:
    """A digest of names, shapes and contents of all tensors of a model, whatever their layout."""
    return tensors_digest(chain(model.named_parameters(), model.named_buffers()))


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """As `model_digest`, of tensors with names."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.layout}\n".encode())
        for part in _parts(tensor.detach()):
            digest.update(memory_of(part.cpu().contiguous()))
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """A digest of a nested value, such as a batch; what is not a tensor counts by its pickle.

    Raises what pickle raises.
    """
    digest = hashlib.sha256()
    for part in _described(value, frozenset()):
        digest.update(part)
    return digest.hexdigest()


def _described(value: Any, around: frozenset[int]) -> Iterator[bytes]:
    parts = parts_of(value)
    if isinstance(value, Tensor):
        yield tensors_digest([("", value)]).encode()
    elif parts is None:
        yield pickle.dumps(value)
    elif id(value) not in around:  # else it contains itself
        yield f"{type(value).__name__} of {list(parts)}\n".encode()
        for part in parts.values():
            yield from _described(part, around | {id(value)})


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; what is written there is in the tensor."""
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # it lives as long as the view
    return memoryview(memory).cast("B")


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Dense tensors that hold the contents."""
    if tensor.is_meta:
        return
    if tensor.layout is torch.sparse_coo:
        whole = tensor.coalesce()
        yield from (whole.indices(), whole.values())
    elif tensor.layout in _COMPRESSED_ROWS:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _COMPRESSED_COLUMNS:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_quantized:
        yield tensor.int_repr()
    elif tensor.is_mkldnn:
        yield tensor.to_dense()
    else:
        # a lazy conjugate or negative shares the memory of its source
        yield tensor.resolve_conj().resolve_neg()
