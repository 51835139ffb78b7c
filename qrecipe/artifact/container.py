"""The bytes of a stored model: a safetensors file, read without torch and without trusting it.

A file is the length of its header (8 bytes, little-endian), the header (JSON: a table of tensors,
and metadata as strings), and the tensors one after another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qrecipe.errors.findings import ArtifactError
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import one_line, shown
from qrecipe.files import path_text, replace_file, why_not
from qrecipe.recipe.toml.size_limits import json_count

MAX_HEADER = 2**23
"""The largest header that is read: 8 MiB."""

MAX_VALUES = 400_000
"""The most values in the header, and in the texts packed in it: about 5,000 sites."""

MAX_DEPTH = 30
"""The deepest nesting of a JSON text; the plan needs eight levels."""

CHECKSUM = "sha256"
"""The metadata key with the checksum of everything else."""

_LENGTH = 8
_METADATA = "__metadata__"
_CHUNK = 2**20
_SHOWN_PATH = 60
_SHOWN_DIFFERENCES = 3

DType = Literal["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"]
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("I16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "F32"), 4),
    **dict.fromkeys(("I64", "F64"), 8),
}
Size = Annotated[int, Field(ge=0, lt=2**48)]


class Entry(BaseModel):
    """A tensor in the header: where its bytes are, counted from the end of the header."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: DType
    shape: Annotated[tuple[Size, ...], Field(max_length=16)]
    data_offsets: tuple[Size, Size]

    @property
    def nbytes(self) -> int:
        """The size that dtype and shape imply."""
        return math.prod(self.shape) * _BYTES[self.dtype]


_ENTRIES = TypeAdapter(dict[str, Entry])
_TEXTS = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself; ``start`` is where the tensors begin."""

    file: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Entry]
    start: int

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def problem(
    code: str, file: str, what: str, hint: str | None = None, differences: Sequence[str] = ()
) -> ArtifactError:
    """The error about a stored model: it names the file and the first few differences."""
    more = len(differences) - _SHOWN_DIFFERENCES
    notes = (*differences[:_SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else []))
    name = file if len(file) <= _SHOWN_PATH else f"…{file[-_SHOWN_PATH:]}"
    message = f"{shown(name)} {one_line(what)}"
    return ArtifactError.of(code, message, hint=hint, notes=tuple(map(one_line, notes)))


def path_of(path: object, what: str) -> Path:
    """The path of a stored model; ``what`` names the function in the error.

    Raises ArtifactError (QR502) if it is not a path.
    """
    return Path(path_text(path, f"{what} takes a path", kind=ArtifactError, code="QR502"))


class StoredFile:
    """A stored model that is open.

    It is opened once, so what is read is what was checked, even if another file takes its place.
    """

    def __init__(self, header: Header, stream: BinaryIO) -> None:
        self.header = header
        self._stream = stream
        self._digests: dict[str, bytes] = {}

    def check(self) -> None:
        """Raises ArtifactError (QR504) if the file is not what was saved."""
        total = _checksum_of(self.header.metadata)
        piece = memoryview(bytearray(_CHUNK))
        for name, entry in sorted(self.header.tensors.items()):
            total.update(_table_row(name, entry))
            own = hashlib.sha256()
            self._seek(entry)
            for start in range(0, entry.nbytes, _CHUNK):
                part = piece[: entry.nbytes - start]
                self._read_into(part)
                total.update(part)
                own.update(part)
            self._digests[name] = own.digest()
        if self.header.metadata.get(CHECKSUM) != total.hexdigest():
            raise self._changed()

    @contextmanager
    def damage_first(self) -> Iterator[None]:
        """Say that the file is damaged (QR504) rather than what is wrong in it, if both are so."""
        try:
            yield
        except ArtifactError:
            self.check()
            raise

    def read_tensor(self, name: str, memory: memoryview) -> None:
        """Read the bytes of a tensor into ``memory``, which has their size.

        Raises ArtifactError (QR504) if they are no longer those that `check` has seen.
        """
        self._seek(self.header.tensors[name])
        self._read_into(memory)
        if hashlib.sha256(memory).digest() != self._digests[name]:
            raise self._changed()

    def _seek(self, entry: Entry) -> None:
        self._stream.seek(self.header.start + entry.data_offsets[0])

    def _read_into(self, memory: memoryview) -> None:
        with readable(self.header.file):
            size = self._stream.readinto(memory)  # type: ignore[attr-defined]
        if size != len(memory):
            raise self._changed()

    def _changed(self) -> ArtifactError:
        hint = "it was damaged or modified since it was saved: copy it again"
        what = "is not what was saved: its checksum differs"
        return problem("QR504", self.header.file, what, hint)


@contextmanager
def opened(path: Path) -> Iterator[StoredFile]:
    """A stored model whose header has been checked against its size.

    Raises ArtifactError if the file cannot be read (QR502) or is not a complete safetensors file
    (QR503).
    """
    with opened_bytes(path) as (stream, size):
        with readable(str(path)):
            header = read_header(stream, size, str(path))
        yield StoredFile(header, stream)


@contextmanager
def opened_bytes(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file and its size.

    Raises ArtifactError (QR502) if it cannot be read.
    """
    with ExitStack() as stack:
        with readable(str(path)):
            stream = stack.enter_context(open(path, "rb", opener=_without_waiting))
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise problem("QR502", str(path), "is not a regular file")
        yield stream, status.st_size


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Raises ArtifactError (QR502) for what the operating system says."""
    try:
        yield
    except (OSError, MemoryError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        hint = _near_file(Path(file)) if isinstance(error, FileNotFoundError) else None
        raise problem("QR502", file, f"cannot be read: {why.lower()}", hint) from None


def _near_file(path: Path) -> str | None:
    """A file next to the missing one that may be meant."""
    beside = [file.name for file in path.parent.glob("*") if file.suffix == path.suffix]
    return did_you_mean(path.name, beside)


def write(path: Path, writing: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically. Raises ArtifactError (QR502) if that fails."""
    try:
        replace_file(path, writing)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise problem("QR502", str(path), f"cannot be written: {why_not(error)}") from None


def write_copy(made: Path, path: Path) -> None:
    """Write a copy of a file, as `write` does."""
    with made.open("rb") as source:
        write(path, lambda stream: shutil.copyfileobj(source, stream))


def header_bytes(
    tensors: Mapping[str, Entry], metadata: Mapping[str, str], checksum: str = "0" * 64
) -> bytes:
    """The start of a file, up to its tensors; it is as long with any checksum."""
    texts = {**metadata, CHECKSUM: checksum}
    table = {name: entry.model_dump() for name, entry in tensors.items()}
    text = json.dumps({_METADATA: texts, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # the tensors start at a multiple of 8 bytes
    return len(text).to_bytes(_LENGTH, "little") + text


def write_tensors(
    stream: BinaryIO,
    tensors: Mapping[str, Entry],
    metadata: Mapping[str, str],
    content_of: Callable[[str], bytes | memoryview],
) -> None:
    """Write a whole file, one tensor after another, with its checksum."""
    start = len(header_bytes(tensors, metadata))
    total = _checksum_of(metadata)
    for name, entry in sorted(tensors.items()):
        content = content_of(name)
        total.update(_table_row(name, entry))
        total.update(content)
        stream.seek(start + entry.data_offsets[0])
        stream.write(content)
    stream.seek(0)
    stream.write(header_bytes(tensors, metadata, total.hexdigest()))


def _checksum_of(metadata: Mapping[str, str]) -> hashlib._Hash:
    """The SHA-256 of the other metadata, to which each tensor is added, sorted by name."""
    others = {key: text for key, text in metadata.items() if key != CHECKSUM}
    return hashlib.sha256(_canonical(others))


def _table_row(name: str, entry: Entry) -> bytes:
    """What the checksum has before the bytes of a tensor."""
    return _canonical([name, entry.dtype, entry.shape])


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_header(stream: BinaryIO, size: int, file: str) -> Header:
    """The header at the start of a stream, for a file of ``size`` bytes.

    Raises ArtifactError (QR503).
    """
    prefix = stream.read(_LENGTH)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH or length > size - _LENGTH or length > MAX_HEADER:
        hint = "was it truncated, or is it another kind of file?"
        raise problem("QR503", file, "is not a complete safetensors file", hint)
    metadata, tensors = _parsed(stream.read(length), file)
    _check_layout(tensors, size - _LENGTH - length, file)
    return Header(file, metadata, tensors, _LENGTH + length)


def _parsed(text: bytes, file: str) -> tuple[dict[str, str], dict[str, Entry]]:
    try:
        data = json_of(text.decode("utf-8"), _without_duplicates)
        if not isinstance(data, dict):
            raise ValueError("it has no table of tensors")
        metadata = _TEXTS.validate_python(data.pop(_METADATA, {}), strict=True)
        # JSON has no tuples, and a strict model only takes lists for them when it reads JSON
        return metadata, _ENTRIES.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise problem("QR503", file, f"has a bad header: {shown(at)}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise problem("QR503", file, f"has a bad header: {error}") from None


def json_of(text: str, table: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> Any:
    """Parse an untrusted JSON text; ``table`` makes a table of its pairs.

    Raises ValueError or RecursionError.
    """
    if json_count(text) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    value = json.loads(text, object_pairs_hook=table)
    if _is_deep(value):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_layout(tensors: Mapping[str, Entry], available: int, file: str) -> None:
    """Check that the tensors fill the rest of the file without gaps or overlaps."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != entry.nbytes:
            raise problem("QR503", file, f"has a bad header: wrong offsets of {shown(name)}")
        end = stop
    if end > available:
        hint = "it was truncated: copy it again"
        missing = f"lacks {end - available:,} of its {end:,} bytes of tensors"
        raise problem("QR503", file, missing, hint)
    if end < available:
        raise problem("QR503", file, f"has {available - end:,} extra bytes after its tensors")
