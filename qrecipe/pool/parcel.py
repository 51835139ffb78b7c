"""What all pieces of one work need, in a file that each worker reads once."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qrecipe import _version
from qrecipe.errors.findings import ExecutionError
from qrecipe.errors.text import first_line
from qrecipe.model.kept import PRIVATE
from qrecipe.model.nested import map_tensors
from qrecipe.observers.loading import registered_for
from qrecipe.planning.cpu import cpu_name
from qrecipe.pool.folder import own_folder
from qrecipe.pool.workers import Factory
from qrecipe.process.threads import TorchSettings
from qrecipe.recipe.recipe import Recipe
from qrecipe.registry.arguments import Kind

Compute = Callable[[Any], Any]
"""Computes one piece."""


class Work(Protocol):
    """What workers compute: a dataclass that can be pickled, perhaps all but its model."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def recipe(self) -> Recipe: ...

    def begun(self, batches: Sequence[Any]) -> Compute:
        """Get ready in a worker for pieces on these batches."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Names the file in each piece. ``settings`` are those that torch computes with.

    The digest identifies the content: another file in its place is refused before it is opened.
    """

    file: str
    sha256: str
    settings: TorchSettings


@dataclass(frozen=True, slots=True)
class Blob:
    """A batch in the file of batches, as bytes of this place and digest."""

    start: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in the file. ``path`` is where modules are found, ``plugins`` who registers what."""

    environment: Mapping[str, str]
    path: tuple[str, ...]
    plugins: tuple[tuple[Kind, str, str], ...]
    work: bytes
    made: bytes | None
    file: str
    blobs: tuple[Blob, ...]


@contextmanager
def sent(
    work: Work, batches: Iterable[Any], factory: Factory | None
) -> Iterator[tuple[Parcel, int]]:
    """The parcel, and the number of batches in it; its files are there inside the ``with``.

    Raises ``ExecutionError`` (QR426) if something cannot be pickled.
    """
    with own_folder() as folder:
        packed, made = _packed_work(work, factory)
        file = folder / "batches"
        blobs = tuple(_written(file, batches))
        contents = Contents(
            environment(),
            tuple(map(os.path.abspath, sys.path)),
            registered_for(work.recipe),
            packed,
            made,
            str(file),
            blobs,
        )
        data = pickle.dumps(contents)
        path = folder / "work"
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        yield Parcel(str(path), digest, TorchSettings.here()), len(blobs)


def _written(file: Path, batches: Iterable[Any]) -> Iterator[Blob]:
    with file.open("wb") as stream:
        for index, batch in enumerate(batches):
            try:
                data = _packed(map_tensors(_compact, batch))
            except Exception as error:
                raise _unpicklable(f"batch {index}", error) from error
            yield Blob(stream.tell(), len(data), hashlib.sha256(data).hexdigest())
            stream.write(data)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without the rest of what it is a view of, which pickling would take along."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return tensor
    is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.detach().clone() if is_view else tensor


def _packed(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_module=_pickling())
    return stream.getvalue()


def _pickling() -> Any:
    """cloudpickle, which also takes lambdas and classes of ``__main__``, or else pickle."""
    is_there = importlib.util.find_spec("cloudpickle") is not None
    return importlib.import_module("cloudpickle" if is_there else "pickle")


def _packed_work(work: Work, factory: Factory | None) -> tuple[bytes, bytes | None]:
    """The work, and what makes its model in a worker if that cannot be pickled."""
    try:
        return _packed(work), None
    except Exception as error:
        if factory is None:
            raise _cannot_send(work) or _unpicklable("the work", error) from error
    rest: Any = work
    rest = replace(rest, model=None)
    try:
        made = factory, dict(_tensors(work.model)), vars(work.model).get(PRIVATE)
        return _packed(rest), _packed(made)
    except Exception as error:
        raise _cannot_send(rest) or _unpicklable("factory", error) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tensor.detach()


def _cannot_send(work: Any) -> ExecutionError | None:
    """The error that names the arguments that cannot be pickled, if it is one of them."""
    errors = {each.name: _refusal(getattr(work, each.name)) for each in fields(work)}
    found = [
        finding
        for name, error in errors.items()
        if error is not None
        for finding in _unpicklable(name, error).findings
    ]
    return ExecutionError(found) if found else None


def _refusal(value: Any) -> Exception | None:
    """Why a value cannot be pickled."""
    try:
        _packed(value)
    except Exception as error:
        return error
    return None


def _unpicklable(what: str, error: Exception) -> ExecutionError:
    hint = "pass something that can be pickled: functions and classes of a module"
    if what == "model":
        hint = "let each worker make it: pool=qrecipe.Pool(executor, factory=...)"
    elif _pickling() is pickle:
        hint += ", or install cloudpickle"
    text = f"{what} cannot be pickled for the workers: {type(error).__name__}: {first_line(error)}"
    return ExecutionError.of("QR426", text, hint=hint)


def environment() -> dict[str, str]:
    """What results depend on besides the work: they are the same to the bit where this is."""
    return {
        "qrecipe": _version.__version__,
        "torch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "CPU": cpu_name(),
    }


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """What is not as wanted, in words: ``torch 2.10.0 instead of 2.13.0``."""
    return [
        f"{what} {found.get(what)} instead of {value}"
        for what, value in wanted.items()
        if found.get(what) != value
    ]
