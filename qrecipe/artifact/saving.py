"""A converted model -> one safetensors file, written atomically."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from qrecipe.artifact.container import header_of, path_of, problem
from qrecipe.artifact.metadata import Contents, contents_of, metadata_of, needs_of
from qrecipe.artifact.state import Slot, slots_of
from qrecipe.artifact.tensors import STORABLE, bytes_of, serialized
from qrecipe.artifact.value_checks import value_problems
from qrecipe.errors.findings import ArtifactError, Finding
from qrecipe.errors.text import shown
from qrecipe.execution.provenance import architecture, provenance
from qrecipe.files import replace_file, why_not
from qrecipe.model.architecture import graph_digests
from qrecipe.planning.plan import Plan
from qrecipe.process.neutral import neutral


@neutral
def save_quantized(converted: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a converted model to one safetensors file, with all that `load_quantized` needs.

    Integers, scales and zero points are separate tensors; recipe, plan and versions are in the
    metadata. An existing file is replaced atomically.

    Raises:
        ArtifactError: the model was not converted by qrecipe (QR501) or cannot be stored (QR511),
            or the file cannot be written (QR502).
    """
    content = _content(converted)
    file = path_of(path, "save_quantized")
    try:
        replace_file(file, content)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise problem("QR502", str(file), f"cannot be written: {why_not(error)}") from None


def _content(converted: nn.Module) -> bytes:
    origin, recorded = provenance(converted), architecture(converted)
    slots = slots_of(converted)
    stored = _Stored(slots)
    problems = value_problems(converted, slots, stored.all)
    if problems:
        raise ArtifactError([Finding("QR511", f"the model has {text}") for text in problems])
    contents = Contents(
        recipe=origin.recipe,
        fingerprint=origin.fingerprint,
        plan=origin.plan,
        versions=dict(origin.versions),
        needs=needs_of(Plan.from_json(origin.plan)),
        architecture=recorded.model_copy(update={"graphs": graph_digests(converted, recorded)}),
        aliases=stored.aliases,
        layouts=stored.layouts,
        cpu=origin.cpu,
        unjudged=origin.unjudged,
    )
    content = serialized(stored.tensors, metadata_of(contents))
    _check_readable(content)
    return content


def _check_readable(content: bytes) -> None:
    """Refuse a file that would exceed the limits for reading."""
    try:
        contents_of(header_of(content, "its file"))
    except ArtifactError as error:
        text = f"the model cannot be stored: {error.findings[0].message}"
        raise ArtifactError(Finding("QR511", text)) from None


class _Stored:
    """The tensors of a model by name, each once: ``all`` before and ``tensors`` after sharing.

    Shared parameters and buffers are stored once, as are packed weights of equal content: a
    convolution that is called twice was packed twice.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.all: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.layouts: dict[str, tuple[int, ...]] = {}
        self._names: dict[Hashable, str] = {}
        for slot in slots:
            for name, tensor in _tensors(slot).items():
                self._add(name, tensor, _identity(slot, tensor))

    def _add(self, name: str, tensor: Tensor, identity: Hashable) -> None:
        if tensor.dtype not in STORABLE or tensor.layout != torch.strided:
            what = f"{shown(name)} is a tensor of {tensor.dtype}, {tensor.layout}"
            raise ArtifactError(Finding("QR511", f"the model cannot be stored: {what}"))
        if name in self.all:
            text = f"the model cannot be stored: two of its tensors are named {shown(name)}"
            raise ArtifactError(Finding("QR511", text))
        self.all[name] = tensor
        first = self._names.setdefault(identity, name)
        if first != name:
            self.aliases[name] = first
            return
        order = _order_in_memory(tensor)
        if order is not None:
            self.layouts[name] = order
        self.tensors[name] = tensor.contiguous()


def _tensors(slot: Slot) -> dict[str, Tensor]:
    try:
        return slot.tensors()
    except KeyError:
        kind = type(slot.module).__name__
        text = f"the model cannot be stored: {slot.name} ({kind}) is packed in an unknown way"
        raise ArtifactError(Finding("QR511", text)) from None


def _identity(slot: Slot, tensor: Tensor) -> Hashable:
    """A key that is equal for two tensors if they are to be stored once."""
    if slot.kind == "tensor":
        return id(slot.value)
    if tensor.dim() < 2:
        return object()  # small, and easier to find under its own name
    return tensor.dtype, tensor.shape, hashlib.sha256(bytes_of(tensor.contiguous())).digest()


def _order_in_memory(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor, outermost in memory first; None if it is contiguous."""
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None
