"""What identifies a search: the model's tensors and the environment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from qrecipe import _version
from qrecipe.artifact.tensors import memory_of
from qrecipe.planning.target_cpu import TargetCpu, target_has_vnni

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def model_digest(model: nn.Module) -> str:
    """A digest of names, shapes and contents of all tensors of a model, whatever their layout."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.layout}\n".encode())
        for part in _parts(tensor.detach()):
            digest.update(memory_of(part.cpu().contiguous()))
    return digest.hexdigest()


def environment(target_cpu: TargetCpu) -> str:
    """What accuracy depends on besides model and recipe: versions and the kernels' CPU."""
    vnni = "a CPU with VNNI" if target_has_vnni(target_cpu) else "a CPU without VNNI"
    return f"torch {torch.__version__}, qrecipe {_version.__version__}, {vnni}"


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
