"""A converted model -> one safetensors file, written atomically."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.artifact.container import (
    DType,
    Entry,
    header_bytes,
    path_of,
    read_header,
    write,
    write_tensors,
)
from qrecipe.artifact.metadata import Contents, Origin, contents_of, needs_of, texts_of
from qrecipe.artifact.value_checks import ValueChecks
from qrecipe.errors.findings import ArtifactError, Finding
from qrecipe.errors.text import shown
from qrecipe.execution.provenance import (
    Provenance,
    architecture,
    converted_graphs,
    provenance,
)
from qrecipe.execution.state import Slot, slots_of
from qrecipe.model.addresses import site_of
from qrecipe.model.architecture import graph_digests
from qrecipe.model.digest import memory_of
from qrecipe.planning.plan import Plan
from qrecipe.process.neutral import neutral

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


@neutral
def save_quantized(converted: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a converted model to one safetensors file, with everything that `load_quantized` needs.

    Integers, scales and zero points are separate tensors; recipe, plan and versions are in the
    metadata. An existing file is replaced atomically. No more than one unpacked weight is in memory
    at a time.

    Raises:
        ArtifactError: the model was not converted by qrecipe (QR501) or cannot be stored (QR511),
            or the file cannot be written (QR502).
    """
    origin, recorded = provenance(converted), architecture(converted)
    _check_marked(converted)
    stored = _Stored(converted)
    contents = Contents(
        **_origin_values(origin),
        architecture=recorded.model_copy(update={"graphs": graph_digests(converted, recorded)}),
        aliases=stored.aliases,
        layouts=stored.layouts,
    )
    entries, metadata = stored.entries, texts_of(contents)
    header = header_bytes(entries, metadata)
    size = len(header) + sum(entry.nbytes for entry in entries.values())
    try:  # refuse a file that would exceed the limits for reading
        contents_of(read_header(io.BytesIO(header), size, "its file"))
    except ArtifactError as error:
        raise _unstorable(error.findings[0].message) from None
    file = path_of(path, "save_quantized")
    write(file, lambda stream: write_tensors(stream, entries, metadata, stored.content_of))


def _check_marked(converted: nn.Module) -> None:
    """Raises ``ArtifactError`` (QR511) for a model whose operations no longer know their sites."""
    nodes = [node for part in converted_graphs(converted).values() for node in part.graph.nodes]
    if nodes and not any(map(site_of, nodes)):
        hint = "store the model that qrecipe.quantize or CompiledRecipe.convert returned"
        raise _unstorable("it was pickled, and torch traced it anew", hint)


def text_of(origin: Provenance) -> str:
    """The text for files of other runtimes, JSON that begins with `carried.BEGINNING`."""
    return json.dumps(texts_of(Origin(**_origin_values(origin))))


def _origin_values(provenance: Provenance) -> dict[str, Any]:
    """The values of the `Origin` that a file gets."""
    known = {each.name: getattr(provenance, each.name) for each in fields(provenance)}
    needs = needs_of(Plan.from_json(provenance.plan))
    return {**known, "versions": dict(provenance.versions), "needs": needs}


class _Stored:
    """The tensors of a model as a file holds them, each once.

    Shared parameters and buffers are stored once, as are packed weights of equal content: a
    convolution that is called twice was packed twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self.aliases: dict[str, str] = {}
        self.layouts: dict[str, tuple[int, ...]] = {}
        self._sources: dict[str, Tensor | Slot] = {}  # large weights are unpacked again
        self._names: dict[Hashable, str] = {}
        self._shapes: dict[str, Tensor] = {}
        checks = ValueChecks(model)
        problems = [text for slot in slots_of(model) for text in self._add_slot(slot, checks)]
        if problems:
            raise ArtifactError([Finding("QR511", f"the model has {text}") for text in problems])
        self.entries = _entries(self._shapes)

    def content_of(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        source = self._sources[name]
        tensor = source.tensors()[name] if isinstance(source, Slot) else source
        return memory_of(tensor.contiguous())

    def _add_slot(self, slot: Slot, checks: ValueChecks) -> list[str]:
        """Add the tensors of a slot; what is wrong with them."""
        try:
            tensors = slot.tensors()
        except KeyError:
            kind = type(slot.module).__name__
            raise _unstorable(f"{slot.name} ({kind}) is packed in an unknown way") from None
        for name, tensor in tensors.items():
            if name in self._sources or name in self.aliases:
                raise _unstorable(f"two of its tensors are named {shown(name)}")
            self._add(slot, name, tensor)
        return list(checks.problems(slot, tensors))

    def _add(self, slot: Slot, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise _unstorable(f"{shown(name)} is a tensor of {tensor.dtype}, {tensor.layout}")
        is_large_copy = slot.kind == "packed" and tensor.dim() > 1
        identity: Hashable = name  # scales and biases are easier to find under their own names
        if slot.kind == "tensor":
            identity = id(slot.value)
        elif is_large_copy:
            digest = hashlib.sha256(memory_of(tensor)).digest()
            identity = tensor.dtype, tensor.shape, digest
        first = self._names.setdefault(identity, name)
        if first != name:
            self.aliases[name] = first
            return
        self._sources[name] = slot if is_large_copy else tensor
        self._shapes[name] = tensor.to("meta")
        order = _order_in_memory(tensor)
        if order is not None:
            self.layouts[name] = order


def _entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The table of the tensors; the widest come first, which keeps all of them aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    table: dict[str, Entry] = {}
    start = 0
    for name in names:
        tensor, end = tensors[name], start + tensors[name].nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        table[name] = Entry(dtype=dtype, shape=shape, data_offsets=(start, end))
        start = end
    return table


def _order_in_memory(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor, outermost in memory first; None if it is contiguous."""
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None


def _unstorable(what: str, hint: str | None = None) -> ArtifactError:
    return ArtifactError.of("QR511", f"the model cannot be stored: {what}", hint=hint)
