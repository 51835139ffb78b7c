"""The text that qrecipe leaves in files for other runtimes, read without torch and the runtimes.

Files are not trusted: what is read of one is bounded, whatever it says about itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

from qrecipe.artifact.carriers import READERS, Kind, kind_of
from qrecipe.artifact.container import json_of, opened_bytes, problem, readable
from qrecipe.artifact.origin import Checked, Origin, checked, origin_of


@dataclass(frozen=True, slots=True)
class Carried:
    """What a file for another runtime says about its origin; ``kind`` is the kind of file."""

    file: str
    kind: Kind
    nbytes: int
    origin: Origin
    checked: Checked


def carried(path: Path) -> Carried | None:
    """What a file says about its origin; None for a file that is of no runtime, as stored models.

    Raises ArtifactError if it cannot be read (QR502), if it says nothing or its origin contradicts
    itself (QR505), or if it is from a newer qrecipe (QR506).
    """
    file = str(path)
    with opened_bytes(path) as (stream, size), readable(file):
        kind = kind_of(stream.read(8))
        if kind is None:
            return None
        text = _text(kind, stream, size, file)
    origin = origin_of(Origin, _texts(text, file), file)
    return Carried(file, kind, size, origin, checked(origin, file))


def _text(kind: Kind, stream: BinaryIO, size: int, file: str) -> str:
    stream.seek(0)
    try:
        found = READERS[kind](stream, size)
    except (ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
        raise problem("QR505", file, f"is damaged, or no file of {kind}: {e}") from None
    if found is None:
        hint = "only files that qrecipe exported say where they come from"
        raise problem("QR505", file, "says nothing about a recipe", hint)
    return found


def _texts(text: str, file: str) -> Mapping[str, str]:
    try:
        found = json_of(text)
        if isinstance(found, dict) and all(isinstance(each, str) for each in found.values()):
            return found
        why = "they are no table of texts"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise problem("QR505", file, f"has bad metadata: {why}")
