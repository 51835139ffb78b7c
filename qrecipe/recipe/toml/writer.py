"""Writes resolved values as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

LOCK_SUFFIX = ".lock.toml"
"""The extension of lock files, which are TOML too, but not recipes."""

_TABLES = ("tensor", "qconfig", "rules", "transform", "calibration", "qat", "fx", "lint")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(values: Mapping[str, Any]) -> str:
    """A recipe's values as TOML, in the order of the documentation."""
    blocks = [_pairs({key: value for key, value in values.items() if key not in _TABLES})]
    for name in _TABLES:
        blocks += _table_blocks(name, values.get(name, {}))
    return "\n\n".join(map("\n".join, blocks)) + "\n"


def toml_value(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def toml_key(key: str) -> str:
    """A key, quoted if necessary."""
    return key if _BARE.fullmatch(key) else _quoted(key)


def _table_blocks(name: str, table: Mapping[str, Any]) -> Iterator[list[str]]:
    if name in ("tensor", "qconfig", "transform"):
        for key, inner in table.items():
            yield [f"[{name}.{toml_key(key)}]", *_pairs(inner)]
    elif name == "rules":
        if "global" in table:
            yield ["[rules]", f"global = {_rule(table['global'])}"]
        for tier in ("module_type", "function", "module_name"):
            if tier in table:
                rules = (f"{_quoted(key)} = {_rule(rule)}" for key, rule in table[tier].items())
                yield [f"[rules.{tier}]", *rules]
    elif table:
        yield [f"[{name}]", *_pairs(table)]


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{toml_key(key)} = {_paragraph(value) or _short(value)}" for key, value in table.items()
    ]


def _paragraph(value: Any) -> str | None:
    """A multi-line string, if the value has several lines."""
    if not isinstance(value, str) or "\n" not in value:
        return None
    lines = "\n".join(_quoted(line)[1:-1] for line in value.split("\n"))
    return f'"""\n{lines}"""'


def _short(value: Any) -> str:
    """A value on one line; a constructor without arguments is just its name."""
    is_name = isinstance(value, Mapping) and value.keys() == {"name"}
    return toml_value(value["name"] if is_name else value)


def _rule(rule: Mapping[str, Any]) -> str:
    return toml_value(rule["qconfig"] if rule.keys() == {"qconfig"} else rule)


def _quoted(text: str) -> str:
    """A basic string; JSON escapes what TOML forbids, except the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
