"""What runs in a worker: a parcel is read, checked and opened, and its pieces are computed."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pickle
import socket
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from qrecipe.errors.findings import ExecutionError, Finding, QRecipeError
from qrecipe.errors.text import shown
from qrecipe.errors.warn import collected
from qrecipe.files import failing_for
from qrecipe.model.kept import kept_with
from qrecipe.pool.parcel import Blob, Compute, Contents, Parcel, Work, differences, environment
from qrecipe.pool.workers import Factory
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import KIND_TITLE, Kind


@dataclass(frozen=True, slots=True)
class Received:
    """The work, its batches, and where the sender finds modules."""

    work: Work
    batches: Sequence[Any]
    path: tuple[str, ...]


def received(parcel: Parcel) -> Received:
    """Read a parcel. Raises ``ExecutionError`` (QR427) where this worker cannot do its work.

    It is pickled, so it runs as code of whoever sent the piece, which has its digest.
    """
    data = _read(parcel.file, 0, None, parcel.sha256)
    contents: Contents = pickle.loads(data)
    _check_environment(contents.environment)
    with importable(contents.path):
        _register(contents.plugins)
        work: Any = _unpacked(contents.work)
        if contents.made is not None:
            work = replace(work, model=_made(*_unpacked(contents.made)))
    return Received(work, _Batches(contents.file, contents.blobs), contents.path)


@contextmanager
def importable(path: Sequence[str]) -> Iterator[None]:
    """Find modules where the sender finds them inside the ``with``, after the worker's own."""
    former = list(sys.path)
    sys.path += [folder for folder in path if folder not in former]
    try:
        yield
    finally:
        sys.path[:] = former


class _Batches(Sequence[Any]):
    """The batches of a parcel, read one at a time."""

    def __init__(self, file: str, blobs: Sequence[Blob]) -> None:
        self._file, self._blobs = file, blobs

    def __len__(self) -> int:
        return len(self._blobs)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Batches(self._file, self._blobs[index])
        blob = self._blobs[index]
        return _unpacked(_read(self._file, blob.start, blob.size, blob.sha256))


def _read(file: str, start: int, size: int | None, sha256: str) -> bytes:
    """Bytes of a file, if they are those that were sent."""
    what = f"the worker {worker()} cannot read {shown(file)}"
    hint = "workers on other machines need a folder that all of them see: set TMPDIR to one"
    with failing_for(ExecutionError, "QR427", what, hint), open(file, "rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _unfit(f"finds other content in {shown(file)} than was sent")
    return data


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _check_environment(sent: Mapping[str, str]) -> None:
    others = differences(environment(), sent)
    if others:
        hint = "results are only bit-identical if these are the same"
        raise _unfit(f"has {', '.join(others)}", hint)


def _register(plugins: Sequence[tuple[Kind, str, str]]) -> None:
    """Import the modules that register what the recipe names; entry points need no help."""
    for kind, name, module in plugins:
        if registered.find(kind, name) is None:
            with suppress(ImportError):
                importlib.import_module(module)
        if registered.find(kind, name) is None:
            raise _unfit(
                f"has no {KIND_TITLE[kind]} {shown(name)}, which {module} registers",
                "register it in a module that the workers can import, or publish an entry point",
            )


def _made(factory: Factory, tensors: Mapping[str, Tensor], kept: Any) -> nn.Module:
    """The model of the factory with the tensors of the caller's, and what we keep with it."""
    model: Any = factory()
    if not isinstance(model, nn.Module):
        hint = "return the model alone, without example inputs"
        raise _unfit(f"gets a {type(model).__name__} from factory, not a model", hint)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    differing = [
        name
        for name in {**own, **tensors}
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if differing:
        text = f"gets another model from factory: it differs in {shown(differing[0])}"
        raise _unfit(text, "return the model that is passed, built by its own code")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    if kept is not None:
        kept_with(model).update(kept)
    made: nn.Module = model.eval()
    return made


def _unfit(what: str, hint: str | None = None) -> ExecutionError:
    return ExecutionError.of("QR427", f"the worker {worker()} {what}", hint=hint)


def worker() -> str:
    """The host and the process."""
    return f"{socket.gethostname()}:{os.getpid()}"


_MOST = 2
"""How many works a worker keeps: a search ranks sites on the side."""

_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The value of a piece or its error, and the warnings on the way, those of a start included.

    ``trace`` is the traceback of an error that is not ours.
    """

    worker: str
    value: Any = None
    error: Exception | None = None
    trace: str | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class _Begun:
    compute: Compute
    path: tuple[str, ...]
    findings: tuple[Finding, ...]


_BEGUN: OrderedDict[str, _Begun] = OrderedDict()
"""Works that this process is ready for, by the digest of their parcel."""


def run(parcel: Parcel, piece: Any) -> Outcome:
    """Compute a piece; one at a time, since a work has models that pieces change and put back."""
    with _ALONE:
        try:
            return _run(parcel, piece)
        except Exception as error:
            trace = None if isinstance(error, QRecipeError) else traceback.format_exc()
            return Outcome(worker(), error=_that_travels(error), trace=trace)


@neutral
@ranks.alone()
def _run(parcel: Parcel, piece: Any) -> Outcome:
    with parcel.settings.used(), collected() as findings:
        begun = _begun(parcel)
        with importable(begun.path):
            value = begun.compute(piece)
    return Outcome(worker(), value, findings=tuple(dict.fromkeys((*begun.findings, *findings))))


def _begun(parcel: Parcel) -> _Begun:
    if parcel.sha256 in _BEGUN:
        _BEGUN.move_to_end(parcel.sha256)
        return _BEGUN[parcel.sha256]
    while len(_BEGUN) >= _MOST:  # before another one takes memory
        _BEGUN.popitem(last=False)
    with collected() as findings:
        got = received(parcel)
        with importable(got.path):
            compute = got.work.begun(got.batches)
    _BEGUN[parcel.sha256] = _Begun(compute, got.path, tuple(findings))
    return _BEGUN[parcel.sha256]


def _that_travels(error: Exception) -> Exception:
    """The error if it can be pickled, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
