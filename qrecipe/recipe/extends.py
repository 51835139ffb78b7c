"""Recipes that extend other recipes: reading the bases and merging everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from qrecipe.errors.findings import (
    Finding,
    RecipeError,
    RecipeReferenceError,
    RecipeSyntaxError,
)
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
from qrecipe.recipe.toml.document import MAX_ITEMS, Document, parse_document
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

    @property
    def paths(self) -> Iterator[KeyPath]:
        """Where values are set, including arguments of constructors and keys of rules."""
        for at, setting in self.settings.items():
            yield at
            if isinstance(setting.value, dict):
                yield from ((*at, key) for key in setting.value)

    def sets(self, path: KeyPath) -> bool:
        """Whether a file has the path, as one of `paths`."""
        is_known = path in self.settings or path[:-1] in self.settings
        return is_known and path in self.owner(path).document.spans

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
    top = reader.read(source if text is None else replace(source, text=text), ())
    assert top is not None, "only what was read before may be missing"
    settings, conflicts = resolve(top)
    return Composition(top, settings, (*reader.findings, *conflicts))


class _Reader:
    """Reads layers, each file once."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._layers: dict[str, Layer | None] = {}
        self._open: set[str] = set()
        self._size = 0

    def read(self, source: Source, chain: tuple[str, ...]) -> Layer | None:
        """The layer of a source, with all its bases; None if it could not be read before.

        Raises RecipeError if it cannot be read at all.
        """
        key = identity(source)
        if key in self._open:
            message = "recipes extend each other in a cycle"
            hint = "move what both need into a third recipe, and extend that"
            raise RecipeReferenceError.of("QR121", message, hint=hint)
        if key in self._layers:
            return self._layers[key]
        if len(self._layers) >= MAX_LAYERS:
            message = f"more than {MAX_LAYERS} recipes"
            raise RecipeSyntaxError.of("QR005", message, hint="merge some of them")
        self._layers[key] = None
        document = self._document(source.read())
        self._open.add(key)
        self._layers[key] = layer = self._layer(source, document, (*chain, source.title))
        self._open.remove(key)
        return layer

    def _document(self, source: Source) -> Document:
        assert source.text is not None
        document = parse_document(source.text, source.name)
        self._size += document.size
        if self._size > MAX_ITEMS:
            message = f"the recipes have more than {MAX_ITEMS:,} keys and values in total"
            raise RecipeSyntaxError.of("QR002", message, document.spans.start())
        return document

    def _layer(self, source: Source, document: Document, chain: tuple[str, ...]) -> Layer:
        validated = validate(document)
        table, damaged = validated.table, validated.damaged
        layer = Layer(source, document, table, damaged, (), chain, False, settings_of(table))
        self.findings += map(layer.noted, validated.findings)
        references = table.extends
        if len(references) > MAX_LAYERS:
            at = layer.value(("extends",))
            self.findings.append(Finding("QR005", f"extends more than {MAX_LAYERS} recipes", at))
        bases = [
            self._base(layer, index, reference)
            for index, reference in enumerate(references[:MAX_LAYERS])
            if reference.recipe or layer.is_sound(("extends", index))
        ]
        found = [base for base in bases if base is not None]
        closure = dict.fromkeys(each for base in found for each in (base, *base.extended))
        return replace(
            layer,
            extended=tuple(closure),
            misses_bases=(
                len(found) < len(bases)
                or any(base.misses_bases for base in found)
                or any(path[:1] == ("extends",) for path in damaged)
            ),
        )

    def _base(self, layer: Layer, index: int, reference: BaseReference) -> Layer | None:
        name = shown(reference.recipe)
        try:
            source = relative_source(reference.recipe, layer.source)
            name = source.title
            base = self.read(source, layer.chain)
        except RecipeError as error:
            at = layer.value(("extends", index, "recipe"))
            note = chain_text((*layer.chain, name))
            self.findings += (
                replace(each, location=each.location or at, notes=(*each.notes, note))
                for each in error.findings
            )
            return None
        if base is None or reference.sha256 is None or base.damaged or base.misses_bases:
            return base
        actual = layer_fingerprint(base)
        if actual != reference.sha256:
            message = f"{shown(base.source.title)} differs from its pin"
            at, hint = layer.value(("extends", index, "sha256")), f"its fingerprint is {actual}"
            notes = (chain_text((*layer.chain, base.source.title)),)
            self.findings.append(Finding("QR123", message, at, hint, notes=notes))
        return base


def identity(source: Source) -> str:
    """A unique key for a source; names are not unique across folders."""
    return f"<{source.name}>" if source.path is None else str(source.path)
