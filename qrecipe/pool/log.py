"""A log of finished pieces, from which work that was interrupted goes on; and whose log it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qrecipe.errors.findings import ExecutionError
from qrecipe.errors.text import first_problem, shown
from qrecipe.files import check_replaceable_file, failing_for, path_text, replace_file
from qrecipe.pool.parcel import differences

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Owner:
    """What a log belongs to.

    ``work`` is what it is the log of: "a ranking". ``digests`` are named by what a log is for if
    they differ: "another recipe". ``settings`` are shown if they do.
    """

    work: str
    digests: Mapping[str, str]
    settings: Mapping[str, str]

    def check(self, path: Path, found: Owner) -> None:
        """Raises ``ExecutionError`` (QR331) if a log belongs to something else; says to what."""
        text = self._difference(found)
        if text is not None:
            message = f"{shown(str(path))} is the log of {text}"
            hint = "name another file, or delete this one to start over"
            raise ExecutionError.of("QR331", message, hint=hint)

    def _difference(self, found: Owner) -> str | None:
        if found.work != self.work:
            return f"{found.work}, not of {self.work}"
        for what, digest in self.digests.items():
            if found.digests.get(what) != digest:
                return f"{self.work} for {what}"
        others = differences(found.settings, self.settings)
        return f"{self.work} with {', '.join(others)}" if others else None


@dataclass(frozen=True, slots=True)
class PieceLog(Generic[_Value]):
    """The values of finished pieces, by key, in a file that grows by a line for each piece.

    ``kept`` are those of earlier runs. Without a path nothing is written.
    """

    path: Path | None = None
    kept: Mapping[str, _Value] = field(default_factory=dict)
    lines: TypeAdapter[dict[str, _Value]] | None = None

    def value(self, key: str, compute: Callable[[], _Value]) -> _Value:
        """The value of a piece, which is computed and added if it is not known."""
        if key in self.kept:
            return self.kept[key]
        value = compute()
        self.note({key: value})
        return value

    def note(self, values: dict[str, _Value]) -> None:
        """Add what a piece has given. Raises ``ExecutionError`` (QR332) if that fails."""
        if self.path is None or self.lines is None:
            return
        line = self.lines.dump_json(values) + b"\n"
        with usable(self.path, "written"), self.path.open("r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            file.write(line)  # not synced: milliseconds each


@dataclass(frozen=True, slots=True)
class _Head:
    """The first line."""

    format: Literal[1]
    owner: Owner


_HEAD = TypeAdapter(_Head)
_NUMBERS = ConfigDict(strict=True, ser_json_inf_nan="constants")  # NaN and infinity too


def log_path(resume: str | os.PathLike[str]) -> Path:
    """Raises ``RecipeReferenceError`` (QR001) if it is not a path."""
    return Path(path_text(resume, "resume takes a path"))


def open_pieces(resume: str | os.PathLike[str], owner: Owner, kind: Any) -> PieceLog[Any]:
    """The log at a path, or a new one, of values of this type.

    A last line that was not written whole is dropped, even if it is the first. Raises
    ``ExecutionError`` if the log belongs to something else (QR331), is not a log or cannot be
    written (QR332).
    """
    path = log_path(resume)
    lines: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, kind], config=_NUMBERS)
    with usable(path):
        check_replaceable_file(path)
        if not path.exists() or _is_only_begun(path.read_bytes()):
            first = _HEAD.dump_json(_Head(1, owner)) + b"\n"
            replace_file(path, lambda stream: stream.write(first))
        with path.open("r+b") as file:
            *whole, torn = file.read().split(b"\n")
            head, *rest = whole or [b""]
            owner.check(path, _parsed(_HEAD, head, path, 1).owner)
            found = [_parsed(lines, line, path, number) for number, line in enumerate(rest, 2)]
            file.truncate(file.tell() - len(torn))
    return PieceLog(path, {key: value for each in found for key, value in each.items()}, lines)


_START = b'{"format":1,"owner":'


def _is_only_begun(content: bytes) -> bool:
    """Whether a log holds nothing: it is empty, or its first line was not written whole."""
    return b"\n" not in content and _START.startswith(content[: len(_START)])


def _parsed(kind: TypeAdapter[_Value], line: bytes, path: Path, number: int) -> _Value:
    try:
        return kind.validate_json(line, strict=True)
    except ValidationError as error:
        why = f"line {number}: {first_problem(error)}"
        raise no_log(path, "a log of pieces", why) from None


_HINT = "name another file for the log, or delete this one to start over"


def no_log(path: Path, what: str, why: str) -> ExecutionError:
    """The error for a file that is not such a log (QR332)."""
    return ExecutionError.of("QR332", f"{shown(str(path))} is not {what}: {why}", hint=_HINT)


def usable(path: Path, does: str = "used") -> AbstractContextManager[None]:
    """Raises ``ExecutionError`` (QR332) for a log that cannot be read or written inside."""
    return failing_for(ExecutionError, "QR332", f"{shown(str(path))} cannot be {does}", _HINT)
