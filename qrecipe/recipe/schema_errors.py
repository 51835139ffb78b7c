"""Pydantic's errors in the terms of the recipe format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from qrecipe.errors.findings import CODES, Finding
from qrecipe.errors.spelling import did_you_mean, nearest
from qrecipe.errors.text import shown, shown_names
from qrecipe.recipe.schema import (
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
