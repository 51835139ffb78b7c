"""Recipes that extend other recipes: reading the bases and merging everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qrecipe.errors.findings import Finding, Location, RecipeError, RecipeSyntaxError
from qrecipe.errors.text import shown
from qrecipe.recipe.layers import (
    Layer,
    Setting,
    SettingPath,
    Values,
    chain_text,
    layer_fingerprint,
    nested,
    resolve,
    settings_of,
)
from qrecipe.recipe.references import Source, relative_source
from qrecipe.recipe.schema import BaseReference
from qrecipe.recipe.toml.document import MAX_ITEMS, parse_document, read_text
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.validation import validate

MAX_LAYERS = 32
"""The most recipes that may be combined by ``extends``."""


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """The outermost recipe merged with all its bases; ``findings`` are those of reading them."""

    top: Layer
    settings: Mapping[SettingPath, Setting]
    findings: tuple[Finding, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (self.top, *self.top.extended)

    @property
    def is_whole(self) -> bool:
        """Whether all files and their tables could be read, so that missing keys are missing."""
        return not self.top.misses_bases and not any(layer.lost_tables for layer in self.layers)

    @property
    def values(self) -> Values:
        """The resolved values as a nested table."""
        return nested((path, setting.value) for path, setting in self.settings.items())

    def is_sound(self, *path: str) -> bool:
        """Whether no file has a finding at, inside or around that path."""
        return all(layer.is_sound(path) for layer in self.layers)

    def owner(self, path: KeyPath) -> Layer:
        """The layer that set the value at a path; for a table, the nearest one that has it."""
        names = tuple(map(str, path))
        for size in range(len(path), 0, -1):
            if names[:size] in self.settings:
                return self.settings[names[:size]].layer
        return next((layer for layer in self.layers if path in layer.document.spans), self.top)

    def about_key(self, code: str, message: str, path: KeyPath, hint: str | None = None) -> Finding:
        """A finding under the key at a path."""
        layer = self.owner(path)
        return layer.noted(Finding(code, message, layer.key(path), hint))

    def about_value(
        self, code: str, message: str, path: KeyPath, hint: str | None = None
    ) -> Finding:
        """A finding under the value at a path."""
        layer = self.owner(path)
        return layer.noted(Finding(code, message, layer.value(path), hint))


def compose(source: Source, text: str | None = None) -> Composition:
    """Read a recipe (or use its ``text``) and its bases, and merge them.

    Raises RecipeError if the outermost recipe cannot be read at all; all other problems are in the
    findings.
    """
    reader = _Reader()
    top = reader.read(source, (), text)
    settings, conflicts = resolve(top)
    return Composition(top, settings, (*reader.findings, *conflicts))


class _Reader:
    """Reads layers, each file once."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._layers: dict[str, Layer | None] = {}
        self._open: set[str] = set()
        self._size = 0

    def read(self, source: Source, chain: tuple[str, ...], text: str | None = None) -> Layer:
        """The layer of a source, with all its bases.

        Raises RecipeError if the file cannot be read at all.
        """
        if text is None:
            assert source.path is not None, "a source without a path comes with its text"
            text = read_text(source.path, source.name)
        document = parse_document(text, source.name)
        self._size += document.size
        if self._size > MAX_ITEMS:
            message = f"the recipes have more than {MAX_ITEMS:,} keys and values in total"
            raise RecipeSyntaxError(Finding("QR002", message, document.spans.start()))
        validated = validate(document)
        layer = Layer(
            source=source,
            document=document,
            table=validated.table,
            damaged=validated.damaged,
            extended=(),
            chain=(*chain, source.title),
            misses_bases=False,
            settings=settings_of(validated.table),
        )
        self.findings += map(layer.noted, validated.findings)
        self._layers[identity(source)] = None
        self._open.add(identity(source))
        bases = [
            self._base(layer, index, reference)
            for index, reference in enumerate(self._few(layer, validated.table.extends))
            if reference.recipe or layer.is_sound(("extends", index))
        ]
        self._open.remove(identity(source))
        found = [base for base in bases if base is not None]
        layer = replace(
            layer,
            extended=_closure(found),
            misses_bases=(
                len(found) < len(bases)
                or any(base.misses_bases for base in found)
                or any(path[:1] == ("extends",) for path in layer.damaged)
            ),
        )
        self._layers[identity(source)] = layer
        return layer

    def _few(self, layer: Layer, bases: Sequence[BaseReference]) -> Sequence[BaseReference]:
        if len(bases) > MAX_LAYERS:
            at = layer.value(("extends",))
            self.findings.append(Finding("QR005", f"extends more than {MAX_LAYERS} recipes", at))
        return bases[:MAX_LAYERS]

    def _base(self, layer: Layer, index: int, reference: BaseReference) -> Layer | None:
        chain = layer.chain
        at = layer.value(("extends", index, "recipe"))
        try:
            source = relative_source(reference.recipe, layer.source)
        except RecipeError as error:
            note = chain_text((*chain, shown(reference.recipe)))
            self.findings += (
                replace(finding, location=at, notes=(*finding.notes, note))
                for finding in error.findings
            )
            return None
        if identity(source) in self._open:
            message = "recipes extend each other in a cycle"
            hint = "move what both need into a third recipe, and extend that"
            self._report("QR121", message, hint, at, source, chain)
            return None
        if identity(source) in self._layers:
            base = self._layers[identity(source)]
        elif len(self._layers) >= MAX_LAYERS:
            message, hint = f"more than {MAX_LAYERS} recipes", "merge some of them"
            self._report("QR005", message, hint, at, source, chain)
            return None
        else:
            base = self._read_base(source, at, chain)
        if base is not None and reference.sha256 is not None:
            self._check_pin(layer, index, base, reference.sha256)
        return base

    def _read_base(self, source: Source, at: Location, chain: tuple[str, ...]) -> Layer | None:
        try:
            return self.read(source, chain)
        except RecipeError as error:
            note = chain_text((*chain, source.title))
            self.findings += (
                replace(finding, location=finding.location or at, notes=(note,))
                for finding in error.findings
            )
            self._layers[identity(source)] = None
            return None

    def _check_pin(self, layer: Layer, index: int, base: Layer, pinned: str) -> None:
        if base.damaged or base.misses_bases:
            return
        actual = layer_fingerprint(base)
        if actual != pinned:
            finding = Finding(
                "QR123",
                f"{shown(base.source.title)} differs from its pin",
                layer.value(("extends", index, "sha256")),
                f"its fingerprint is {actual}",
                notes=(chain_text((*layer.chain, base.source.title)),),
            )
            self.findings.append(finding)

    def _report(
        self,
        code: str,
        message: str,
        hint: str,
        at: Location,
        source: Source,
        chain: tuple[str, ...],
    ) -> None:
        note = chain_text((*chain, source.title))
        self.findings.append(Finding(code, message, at, hint, notes=(note,)))


def identity(source: Source) -> str:
    """A unique key for a source; names are not unique across folders."""
    return f"<{source.name}>" if source.path is None else str(source.path)


def _closure(bases: Iterable[Layer]) -> tuple[Layer, ...]:
    found = {id(layer): layer for base in bases for layer in (base, *base.extended)}
    return tuple(found.values())
