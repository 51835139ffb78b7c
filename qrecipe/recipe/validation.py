"""Validates one recipe file against the schema.

Wrong parts are removed and the rest is checked further, so that one run shows all findings.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date, time
from itertools import chain, islice
from math import isfinite
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qrecipe._version import __version__
from qrecipe.errors.findings import Finding
from qrecipe.recipe.schema import FORMAT, RecipeTable
from qrecipe.recipe.schema_errors import dotted, meant_key, translated
from qrecipe.recipe.toml.document import Document
from qrecipe.recipe.toml.positions import KeyPath

MAX_FINDINGS = 100
"""The most findings that are shown for one file."""

_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Validated:
    """The valid part of a file, and the findings about the rest.

    ``damaged`` are the paths that were removed, and those that misspelled keys may stand for: what
    is missing there has been reported already.
    """

    table: RecipeTable
    damaged: frozenset[KeyPath]
    findings: tuple[Finding, ...]


def validate(document: Document) -> Validated:
    """The valid part of a document, and a finding for each other part."""
    newer = _newer_format(document)
    if newer is not None:
        return Validated(RecipeTable(), frozenset({()}), (newer,))
    data = copy.deepcopy(document.data)
    odd = chain(_foreign_scalars(document), _empty_tables(document))
    findings = dict(islice(odd, MAX_FINDINGS))
    for path in findings:
        _remove(data, path)
    meant = set[KeyPath]()
    for path, detail in _causes(_errors(data, document), findings):
        if len(findings) < MAX_FINDINGS:
            findings.setdefault(path, translated(detail, path, document.spans))
            if detail["type"] == "extra_forbidden":
                meant.add(meant_key(path) or path)
        _remove(data, path)
    # a table that lost a required key is removed too, without a second finding
    while lost := [path for path, _ in _errors(data, document)]:
        for path in lost:
            _remove(data, path)
    return Validated(
        RecipeTable.model_validate(data), frozenset(findings) | meant, tuple(findings.values())
    )


def _errors(data: dict[str, Any], document: Document) -> list[tuple[KeyPath, ErrorDetails]]:
    """Pydantic's errors, each with the path to remove."""
    try:
        RecipeTable.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        return [(document.spans.known(_culprit(detail)), detail) for detail in details]
    return []


def _causes(
    errors: list[tuple[KeyPath, ErrorDetails]], found: Collection[KeyPath]
) -> Iterator[tuple[KeyPath, ErrorDetails]]:
    """The errors without consequences of others: a missing key may just be misspelled."""
    causes = [path for path, detail in errors if detail["type"] != "missing"]
    spoilt = {path[:size] for path in (*causes, *found) for size in range(len(path))}
    for path, detail in errors:
        if detail["type"] != "missing" or path not in spoilt:
            yield path, detail


def _culprit(detail: ErrorDetails) -> KeyPath:
    return detail["loc"][:-1] if detail["type"] == "missing" else detail["loc"]


def _newer_format(document: Document) -> Finding | None:
    version = document.data.get("format")
    if type(version) is not int or not FORMAT < version < _INT64:
        return None
    message = f"format {version} needs qrecipe {version}.0 or newer"
    hint = f"this is qrecipe {__version__}, which reads format {FORMAT}"
    return Finding("QR111", message, document.spans.value(("format",)), hint)


def _foreign_scalars(document: Document) -> Iterator[tuple[KeyPath, Finding]]:
    """TOML values that no key of a recipe accepts, not even arguments of plugins."""
    pending: list[tuple[KeyPath, Any]] = [((), document.data)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            pending += (((*path, key), item) for key, item in value.items())
        elif isinstance(value, list):
            pending += (((*path, index), item) for index, item in enumerate(value))
        elif (what := _foreign(value)) is not None:
            message = f"{dotted(path)} cannot be {what}"
            yield path, Finding("QR102", message, document.spans.value(path))


def _empty_tables(document: Document) -> Iterator[tuple[KeyPath, Finding]]:
    for section in ("tensor", "qconfig", "transform"):
        tables = document.data.get(section)
        for name, table in tables.items() if isinstance(tables, dict) else ():
            if table == {}:
                path = (section, name)
                key = document.spans.key(path)
                yield path, Finding("QR103", f"{dotted(path)} sets nothing", key, "remove it")


def _foreign(value: Any) -> str | None:
    if isinstance(value, int):  # Python cannot even print integers of thousands of digits
        return None if -_INT64 <= value < _INT64 else "an integer of more than 64 bits"
    if isinstance(value, float):
        return None if isfinite(value) else str(value)
    return "a date or time" if isinstance(value, (date, time)) else None


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    """Remove the value at a path; for an array element, the whole array.

    Of several bases, the others keep their positions, so that they are still read.
    """
    bases = data.get("extends")
    if path[:1] == ("extends",) and len(path) > 1 and isinstance(bases, list):
        _remove_base(bases, *path[1:])
        return
    table: Any = data
    for step, following in zip(path, (*path[1:], None), strict=True):
        inner = table.get(step)
        if following is None or isinstance(inner, list):
            table.pop(step, None)
            return
        if not isinstance(inner, dict):
            return
        table = inner


def _remove_base(bases: list[Any], index: Any, key: str | int | None = None, *_: object) -> None:
    if key is None or not isinstance(bases[index], dict):
        bases[index] = {"recipe": ""}
    else:
        bases[index].pop(key, None)
