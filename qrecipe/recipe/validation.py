"""Validates one recipe file against the schema, in the terms of the recipe format.

Wrong parts are removed and the rest is checked further, so that one run shows all findings.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time
from itertools import chain, islice
from math import isfinite
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qrecipe._version import __version__
from qrecipe.errors.findings import CODES, Finding
from qrecipe.errors.spelling import did_you_mean, nearest
from qrecipe.errors.text import shown, shown_names
from qrecipe.recipe.schema import (
    FORMAT,
    BaseReference,
    CalibrationTable,
    EqualizeTable,
    FxTable,
    LintTable,
    PluginTable,
    QatTable,
    QConfigTable,
    RecipeTable,
    RulesTable,
    RuleTable,
    SmoothTable,
    TensorSpec,
    TransformTable,
)
from qrecipe.recipe.toml.document import Document
from qrecipe.recipe.toml.positions import KeyPath, Spans

_TABLES: dict[KeyPath, type[BaseModel]] = {
    (): RecipeTable,
    ("extends",): BaseReference,
    ("extends", "*"): BaseReference,
    ("tensor", "*"): TensorSpec,
    ("qconfig", "*"): QConfigTable,
    ("rules",): RulesTable,
    ("rules", "global"): RuleTable,
    ("rules", "*", "*"): RuleTable,
    ("transform",): TransformTable,
    ("transform", "equalize"): EqualizeTable,
    ("transform", "smooth"): SmoothTable,
    ("transform", "*"): PluginTable,
    ("calibration",): CalibrationTable,
    ("qat",): QatTable,
    ("fx",): FxTable,
    ("lint",): LintTable,
}
"""The tables by path; a star is a user-defined name."""

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
}
_PATTERNS = {
    "sha256": "a fingerprint of 64 lower-case hexadecimal digits",
    "ignore": 'codes of warnings, such as "QR204"',
}
_SHORT_FORMS = {
    "observer": "a name, or a table with a name",
    "fake_quant": "a name, or a table with a name",
    "extends": "a reference, or a list of them",
    "global": "the name of a qconfig, or a table",
}

_LISTED = 12
_WARNINGS = [code for code, meaning in CODES.items() if meaning.error is None]


def translated(detail: ErrorDetails, path: KeyPath, spans: Spans) -> Finding:
    """Pydantic's error at a path as a finding."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, detail["input"], spans)
    if kind == "missing":
        missing = detail["loc"][-1]
        return Finding("QR103", f'{dotted(path)} needs a "{missing}"', spans.key(path))
    where = dotted(path)
    if kind == "literal_error":
        allowed = re.findall("'([^']*)'", detail["ctx"]["expected"])
        message = f"{where} cannot be {shown(detail['input'])}"
        return Finding("QR102", message, spans.value(path), one_of(detail["input"], allowed))
    if kind == "code_of_error":
        message = f"{shown(detail['input'])} is the code of an error, which cannot be ignored"
        return Finding("QR102", message, spans.value(path), one_of(detail["input"], _WARNINGS))
    message = f"{where} must be {_expected(detail, path)}, not {shown(detail['input'])}"
    return Finding("QR102", message, spans.value(path))


def meant_key(path: KeyPath) -> KeyPath | None:
    """The known key that an unknown one may stand for."""
    near = nearest(str(path[-1]), _known_keys(_table_at(path[:-1])))
    return (*path[:-1], near[0]) if near else None


def one_of(value: object, allowed: Iterable[str]) -> str:
    """The allowed values as a hint, with a suggestion if one is close."""
    names = list(dict.fromkeys(allowed))
    rest = ", ..." if len(names) > _LISTED else ""
    listed = f"one of {shown_names(names[:_LISTED])}{rest}"
    suggestion = did_you_mean(value, names) if isinstance(value, str) else None
    return f"{suggestion} {listed}" if suggestion else listed


def dotted(path: KeyPath) -> str:
    """A path as written in TOML: ``rules.module_name."layer1.0"``."""
    written = ""
    for step in path:
        if isinstance(step, int):
            written += f"[{step}]"
        else:
            bare = re.fullmatch("[A-Za-z0-9_-]{1,80}", step)
            written += ("." if written else "") + (step if bare else shown(step))
    return written


def _unknown_key(path: KeyPath, value: Any, spans: Spans) -> Finding:
    table = _table_at(path[:-1])
    known = _known_keys(table)
    key = str(path[-1])
    hint = did_you_mean(key, known)
    if hint is None and table is RuleTable and path[1] != "global":
        name = f"{path[-2]}.{key}{_dotted_rest(value)}"
        hint = f"a name with dots must be quoted: {shown(name)}"
    where = f" in {dotted(path[:-1])}" if path[:-1] else ""
    hint = hint or f"one of {shown_names(known)}"
    return Finding("QR101", f"unknown key {shown(key)}{where}", spans.key(path), hint)


def _known_keys(table: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in table.model_fields.items()]


def _dotted_rest(value: Any) -> str:
    rest = ""
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        rest += f".{key}"
    return rest


def _table_at(path: KeyPath) -> type[BaseModel]:
    for pattern, table in _TABLES.items():
        if len(pattern) == len(path) and all(
            at in ("*", step) for at, step in zip(pattern, path, strict=True)
        ):
            return table
    return RuleTable


def _expected(detail: ErrorDetails, path: KeyPath) -> str:
    kind = detail["type"]
    if kind in _BOUNDS:
        text, bound = _BOUNDS[kind]
        return f"{text} {detail['ctx'][bound]:g}"
    names = [step for step in path if isinstance(step, str)]
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(names[-1], "a different string")
    if kind == "model_type" and names[0] == "rules" and len(path) > 2:
        return _SHORT_FORMS["global"]
    return _SHORT_FORMS.get(names[-1]) or _TYPES.get(kind, "a different value")


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
