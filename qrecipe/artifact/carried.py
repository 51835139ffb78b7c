"""The text that qrecipe leaves in files for other runtimes, read without torch and the runtimes.

Files are not trusted: what is read of one is bounded, whatever it says about itself.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal
from xml.parsers import expat
from zipfile import BadZipFile, ZipFile

from qrecipe.artifact.container import json_of, opened_bytes, problem, readable
from qrecipe.artifact.metadata import MAX_TEXT, Checked, Origin, checked, origin_of
from qrecipe.errors.text import shown

KEY = "qrecipe"
"""The name of the text in a file's metadata."""

ENTRY = f"extra/{KEY}.json"
"""The name of the text in an archive, below its root."""

BEGINNING = '{"format": "qrecipe '
"""Of every such text."""

Kind = Literal["ONNX", "OpenVINO", "ExecuTorch", "torch's archive"]

_MAX_FIELDS = 10_000
_MAX_XML = 2**27
_MAX_DIRECTORY = 2**24
_CHUNK = 2**20


def _kind_of(start: bytes) -> Kind | None:
    """The kind of a file that starts with these eight bytes."""
    if start[:4] == b"PK\3\4":
        return "torch's archive"
    if start[4:8] == b"ET12":
        return "ExecuTorch"
    if start.startswith((b"<?xml", b"<net")):
        return "OpenVINO"
    # the version of ONNX comes first; a stored model begins with a small number of eight bytes
    return "ONNX" if start[:1] == b"\x08" and any(start[4:]) else None


def _from_onnx(stream: BinaryIO, size: int) -> str | None:
    """The entry of ``metadata_props``: field 14 of a message of Protocol Buffers."""
    for _, entry in _fields(stream, size, 14):
        parts = dict(_fields(BytesIO(entry), len(entry), 1, 2))  # a key and a value
        if parts.get(1) == KEY.encode():
            return parts.get(2, b"").decode()
    return None


def _fields(stream: BinaryIO, size: int, *wanted: int) -> Iterator[tuple[int, bytes]]:
    """The numbers and contents of the wanted fields of a message."""
    for _ in range(_MAX_FIELDS):
        if stream.tell() >= size:
            return
        key = _varint(stream)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _varint(stream)
            continue
        length = {1: 8, 5: 4}.get(kind) if kind != 2 else _varint(stream)
        if length is None or length > size - stream.tell():
            raise ValueError("a field is longer than the file")
        if number not in wanted:
            stream.seek(length, 1)
            continue
        if length > MAX_TEXT:
            raise ValueError(f"a text has more than {MAX_TEXT:,} bytes")
        yield number, stream.read(length)
    raise ValueError(f"it has more than {_MAX_FIELDS:,} fields")


def _varint(stream: BinaryIO) -> int:
    """Raises EOFError at the end, and ValueError for more than 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise EOFError("it is truncated")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number has more than 64 bits")


def _from_xml(stream: BinaryIO, size: int) -> str | None:
    """The value of the element in ``rt_info``; a document type could define entities."""
    if size > _MAX_XML:
        raise ValueError(f"it has more than {_MAX_XML:,} bytes")
    found: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if name == KEY and not found:
            found.append(attributes.get("value", ""))

    def refuse(*declaration: object) -> None:
        raise ValueError("it has a document type")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        while piece := stream.read(_CHUNK):
            parser.Parse(piece)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from None
    return _short(found[0]) if found else None


def _from_archive(stream: BinaryIO, size: int) -> str | None:
    """The entry of a zip file, whose table of contents is not read if it is long."""
    tail = min(size, 2**16 + 22)
    stream.seek(size - tail)
    end = stream.read(tail)
    at = end.rfind(b"PK\5\6")
    directory = int.from_bytes(end[at + 12 : at + 16], "little")
    if at < 0 or directory > _MAX_DIRECTORY:
        raise ValueError("it has no table of contents, or a long one")
    with ZipFile(stream) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(f"/{ENTRY}"):
                with archive.open(entry) as text:
                    return _short(text.read(MAX_TEXT + 1).decode())
    return None


def _from_program(stream: BinaryIO, size: int) -> str | None:
    """A string of FlatBuffers: its length, and its bytes."""
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(BEGINNING.encode())
        if at < 4:
            return None
        length = int.from_bytes(content[at - 4 : at], "little")
        return _short(content[at : at + min(length, MAX_TEXT + 1)].decode())


def _short(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"a text has more than {MAX_TEXT:,} characters")
    return text


_READERS: Mapping[Kind, Callable[[BinaryIO, int], str | None]] = {
    "ONNX": _from_onnx,
    "OpenVINO": _from_xml,
    "torch's archive": _from_archive,
    "ExecuTorch": _from_program,
}
"""The text in a file of a size, or None; they raise ValueError and what libraries raise."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What a file for another runtime says about its origin; ``kind`` is the kind of file."""

    file: str
    kind: Kind
    nbytes: int
    origin: Origin
    checked: Checked


def add_to_archive(path: str | os.PathLike[str], text: str) -> None:
    """Add the text to an archive of torch, below its root."""
    with ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{ENTRY}", text)


def carried(path: Path) -> Carried | None:
    """What a file says about its origin; None for a file that is of no runtime, as stored models.

    Raises ArtifactError if it cannot be read (QR502), if it says nothing, is no file of the runtime
    that its name ends with, or its origin contradicts itself (QR505), or if it is from a newer
    qrecipe (QR506).
    """
    file = str(path)
    with opened_bytes(path) as (stream, size), readable(file):
        kind = _kind_of(stream.read(8))
        if kind is None:
            if stream.read(1) != b"{":  # or it may be a stored model, whatever its name
                _check_name(path)
            return None
        text = _text(kind, stream, size, file)
    origin = origin_of(Origin, _texts(text, file), file)
    return Carried(file, kind, size, origin, checked(origin, file))


_NAMES: Mapping[str, Kind] = {
    ".onnx": "ONNX",
    ".xml": "OpenVINO",
    ".pte": "ExecuTorch",
    ".pt2": "torch's archive",
}


def _check_name(path: Path) -> None:
    """Raises ArtifactError (QR505) for a name that only files of a runtime have."""
    graph = path.with_suffix(".xml")
    if path.suffix == ".bin" and graph.exists():
        hint = f"if it has weights of OpenVINO, inspect {shown(graph.name)} beside it"
        raise problem("QR505", str(path), "says nothing about a recipe", hint)
    if path.suffix in _NAMES:
        raise problem("QR505", str(path), f"is damaged, or is not a file of {_NAMES[path.suffix]}")


def _text(kind: Kind, stream: BinaryIO, size: int, file: str) -> str:
    stream.seek(0)
    try:
        found = _READERS[kind](stream, size)
    except (ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
        raise problem("QR505", file, f"is damaged, or is not a file of {kind}: {e}") from None
    if found is None:
        hint = "only files that qrecipe exported say where they come from"
        raise problem("QR505", file, "says nothing about a recipe", hint)
    return found


def _texts(text: str, file: str) -> Mapping[str, str]:
    try:
        found = json_of(text)
        if isinstance(found, dict) and all(isinstance(each, str) for each in found.values()):
            return found
        why = "they are not a table of strings"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise problem("QR505", file, f"has bad metadata: {why}")
