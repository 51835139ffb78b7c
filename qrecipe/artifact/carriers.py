"""The files of runtimes, as far as the text of qrecipe in them, read without torch and runtimes.

What is read of a file is bounded, whatever it says about itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, Literal
from xml.parsers import expat
from zipfile import ZipFile

from qrecipe.artifact.origin import MAX_TEXT

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


def kind_of(start: bytes) -> Kind | None:
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
    for number, entry in _fields(stream, size, 14):
        parts = dict(_parts(entry)) if number == 14 else {}
        if parts.get(1) == KEY.encode():
            return parts.get(2, b"").decode()
    return None


def _fields(stream: BinaryIO, size: int, wanted: int) -> Iterator[tuple[int, bytes]]:
    """The fields of a message, with the content of one kind only."""
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
        if number != wanted:
            stream.seek(length, 1)
            continue
        if length > MAX_TEXT:
            raise ValueError(f"a text has more than {MAX_TEXT:,} bytes")
        yield number, stream.read(length)
    raise ValueError(f"it has more than {_MAX_FIELDS:,} fields")


def _parts(entry: bytes) -> Iterator[tuple[int, bytes]]:
    """The key and the value of an entry, as fields 1 and 2."""
    at = 0
    while at < len(entry):
        number, start = entry[at] >> 3, at + 1
        length, shift = 0, 0
        while start < len(entry):
            byte = entry[start]
            length |= (byte & 127) << shift
            start, shift = start + 1, shift + 7
            if byte < 128:
                break
        yield number, entry[start : start + length]
        at = start + length


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


READERS: Mapping[Kind, Callable[[BinaryIO, int], str | None]] = {
    "ONNX": _from_onnx,
    "OpenVINO": _from_xml,
    "torch's archive": _from_archive,
    "ExecuTorch": _from_program,
}
"""The text in a file of a size, or None; they raise ValueError and what libraries raise."""
