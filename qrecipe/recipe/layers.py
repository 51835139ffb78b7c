"""How the layers of a recipe are resolved.

Each file is a layer with flat settings: path -> value, which are replaced as a whole. If several
layers set the same path, a layer beats those that it extends; the remaining ones must agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qrecipe.errors.findings import Finding, Location
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import one_line, shown
from qrecipe.recipe.references import Source
from qrecipe.recipe.schema import INHERIT, RecipeTable
from qrecipe.recipe.toml.document import Document
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.validation import dotted

SettingPath = tuple[str, ...]
Values = dict[str, Any]

_MERGING_LEVELS = {
    **dict.fromkeys(("tensor", "qconfig", "rules", "transform"), 2),
    **dict.fromkeys(("calibration", "qat", "fx", "lint"), 1),
}
"""How many levels of a table are merged by key; deeper values are replaced as a whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One recipe file: what it sets, and everything it extends, nearest first.

    ``damaged`` are the paths with findings, ``chain`` is the way from the outermost recipe to this
    one, and ``misses_bases`` means that a base could not be read.
    """

    source: Source
    document: Document
    table: RecipeTable
    damaged: frozenset[KeyPath]
    extended: tuple[Layer, ...]
    chain: tuple[str, ...]
    misses_bases: bool
    settings: Mapping[SettingPath, Any]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def lost_tables(self) -> bool:
        """Whether a whole table was dropped, for example because its name is misspelled."""
        data = self.document.data
        return any(
            not path or (len(path) == 1 and isinstance(data.get(str(path[0])), dict))
            for path in self.damaged
        )

    def is_sound(self, path: KeyPath) -> bool:
        """Whether there is no finding at, inside or around that path."""
        prefixes = (path[:size] for size in range(len(path) + 1))
        return path not in _around(self.damaged) and self.damaged.isdisjoint(prefixes)

    def key(self, path: KeyPath) -> Location:
        """Where this file writes that key."""
        return self.document.spans.key(self.document.spans.known(path))

    def value(self, path: KeyPath) -> Location:
        """Where this file writes that value."""
        return self.document.spans.value(self.document.spans.known(path))

    def noted(self, finding: Finding) -> Finding:
        """The finding with the chain to this file, if it is a base or published."""
        if len(self.chain) == 1 and self.source.publisher is None:
            return finding
        return replace(finding, notes=(*finding.notes, chain_text(self.chain)))


@lru_cache(maxsize=64)
def _around(paths: frozenset[KeyPath]) -> frozenset[KeyPath]:
    return frozenset(path[:size] for path in paths for size in range(len(path)))


@dataclass(frozen=True, slots=True)
class Setting:
    """A resolved value and the layer that set it."""

    value: Any
    layer: Layer


def fingerprint(values: Values) -> str:
    """The SHA-256 of resolved values as canonical JSON, without the description and reasons."""
    settings = nested(significant(flattened(values)).items())
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def significant(settings: Iterable[tuple[SettingPath, Any]]) -> dict[SettingPath, Any]:
    """The settings without the description and reasons, which have no effect."""
    return {path: _significant(path, value) for path, value in settings if path != ("description",)}


def layer_fingerprint(layer: Layer) -> str:
    """The fingerprint of a layer as a recipe of its own, together with its bases."""
    settings, _ = resolve(layer)
    return fingerprint(nested((path, setting.value) for path, setting in settings.items()))


def chain_text(names: Iterable[str]) -> str:
    """The chain from the outermost recipe to a base."""
    return " extends ".join(map(one_line, names))


def settings_of(table: RecipeTable) -> dict[SettingPath, Any]:
    """The settings of one file."""
    values = table.model_dump(by_alias=True, exclude_unset=True, exclude={"extends"})
    return dict(flattened(values))


def flattened(
    values: Mapping[str, Any], above: SettingPath = ()
) -> Iterator[tuple[SettingPath, Any]]:
    """Nested tables as flat settings."""
    for key, value in values.items():
        path = (*above, key)
        merges = len(path) <= _MERGING_LEVELS.get(path[0], 0) and path != ("rules", "global")
        if merges:
            yield from flattened(value, path)
        else:
            yield path, value


def nested(flat: Iterable[tuple[SettingPath, Any]]) -> Values:
    """Flat settings as nested tables."""
    values: Values = {}
    for (*tables, key), value in flat:
        table = values
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return values


def resolve(top: Layer) -> tuple[dict[SettingPath, Setting], list[Finding]]:
    """The resolved settings of ``top`` and its bases, and their conflicts."""
    setters: dict[SettingPath, list[Layer]] = {}
    for layer in reversed((top, *top.extended)):  # keeps the order of the bases
        for path in layer.settings:
            setters.setdefault(path, []).insert(0, layer)
    settings: dict[SettingPath, Setting] = {}
    findings: list[Finding] = []
    for path, layers in setters.items():
        standing = _unbeaten(layers)
        winner, *others = standing
        findings += _conflicts(path, winner, others, top)
        findings += _nothing_inherited(path, layers)
        value = winner.settings[path]
        if not _is_inherit(path, value):
            settings[path] = Setting(value, winner)
    return settings, findings


def _unbeaten(layers: list[Layer]) -> list[Layer]:
    beaten = {id(below) for layer in layers for below in layer.extended}
    return [layer for layer in layers if id(layer) not in beaten]


def _conflicts(
    path: SettingPath, winner: Layer, others: list[Layer], top: Layer
) -> Iterator[Finding]:
    """Other values must agree; a description is about its own file."""
    value = _significant(path, winner.settings[path])
    other = next((o for o in others if _significant(path, o.settings[path]) != value), None)
    if other is None or path == ("description",):
        return
    standing = {id(winner), *map(id, others)}
    for layer in (top, *top.extended):
        if not layer.is_sound(path) and standing <= set(map(id, layer.extended)):
            return  # a recipe that extends them all sets it too, but wrongly
    yield Finding(
        "QR124",
        f"{shown(winner.name)} and {shown(other.name)} set {dotted(path)} differently",
        winner.key(path),
        f"set it in {shown(top.name)}",
        related=(("and", other.key(path)),),
        notes=(chain_text(winner.chain), chain_text(other.chain)),
    )


def _nothing_inherited(path: SettingPath, layers: list[Layer]) -> Iterator[Finding]:
    for layer in layers:
        if not _is_inherit(path, layer.settings[path]) or layer.misses_bases:
            continue
        below = _unbeaten([base for base in layer.extended if path in base.settings])
        inherits = any(not _is_inherit(path, base.settings[path]) for base in below)
        if not inherits and all(base.is_sound(path) for base in layer.extended):
            message = f"{dotted(path)} has nothing to inherit"
            hint = _inherited_name(path, layer)
            if below:
                hint = f"{shown(below[0].name)} has already removed this rule"
            yield layer.noted(Finding("QR125", message, layer.value(path), hint))


def _inherited_name(path: SettingPath, layer: Layer) -> str:
    inherited = (
        at[-1]
        for base in layer.extended
        for at, value in base.settings.items()
        if at[:-1] == path[:-1] and not _is_inherit(at, value)
    )
    return did_you_mean(path[-1], inherited) or f"no base of {shown(layer.name)} has this rule"


def _is_inherit(path: SettingPath, value: Any) -> bool:
    return path[0] == "rules" and value.get("qconfig") == INHERIT


def _significant(path: SettingPath, value: Any) -> Any:
    return unreasoned(value) if path[0] == "rules" else value


def unreasoned(rule: Mapping[str, Any]) -> Values:
    """A rule without its reason, which has no effect."""
    return {key: item for key, item in rule.items() if key != "reason"}
