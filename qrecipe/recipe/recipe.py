"""A recipe as a value: loaded, checked, resolved and written back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli

from qrecipe.errors.findings import (
    Finding,
    Location,
    RecipeReferenceError,
    UnknownNameError,
    error_from,
)
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.spelling import did_you_mean, few_suggestions
from qrecipe.errors.text import one_line, shown
from qrecipe.files import write_atomically
from qrecipe.recipe.checks import findings_of, rules_of
from qrecipe.recipe.extends import Composition, compose, identity
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.layers import Layer, fingerprint, flattened, layer_fingerprint
from qrecipe.recipe.lint import doubtful_findings
from qrecipe.recipe.references import (
    Publisher,
    Source,
    existing_source,
    file_source,
    is_reference,
    named_source,
    path_text,
    titled,
)
from qrecipe.recipe.schema import (
    FLOAT,
    Backend,
    CalibrationTable,
    FxTable,
    LintTable,
    Phase,
    QatTable,
    RecipeTable,
    RuleTable,
    TensorSpec,
)
from qrecipe.recipe.schema_errors import dotted
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.toml.writer import toml_text

Tier = Literal["module_name", "module_type", "function", "global"]


@dataclass(frozen=True, slots=True)
class QConfigSpec:
    """The specs of a weight and an activation; None means not quantized."""

    weight: TensorSpec | None
    activation: TensorSpec | None


@dataclass(frozen=True, slots=True, repr=False)
class WrittenRule(ShortRepr):
    """A rule as the recipe's author knows it: which one, what it says, why, and where.

    ``key`` is as written, and empty for the global rule; ``label`` names a qconfig or tensors, or
    is ``float``. Where a rule is written does not count in comparisons.
    """

    tier: Tier
    key: str
    label: str
    reason: str | None
    location: Location = field(compare=False)

    @property
    def is_float(self) -> bool:
        """Whether the rule leaves things float."""
        return self.label == FLOAT


@dataclass(frozen=True, slots=True, repr=False)
class Rule(WrittenRule):
    """One rule of a resolved recipe.

    ``qconfig`` is None if the rule leaves things float. ``layer`` is the recipe that set it, and
    ``overrides`` are the recipes that this one extends, whose rules it beats.
    """

    qconfig: QConfigSpec | None
    expect: int | None
    optional: bool
    layer: str
    overrides: frozenset[str]

    @property
    def as_written(self) -> WrittenRule:
        """What a plan keeps of the rule."""
        return WrittenRule(self.tier, self.key, self.label, self.reason, self.location)


@dataclass(frozen=True, slots=True, repr=False)
class Ingredient(ShortRepr):
    """One file that a recipe is made of: its name, fingerprint and publisher.

    ``publisher`` is the installed distribution with its version; None for the user's own files,
    texts, and the recipes of qrecipe itself.
    """

    name: str
    fingerprint: str
    publisher: Publisher | None

    @property
    def title(self) -> str:
        """The name, with the distribution and its version if there is one."""
        return titled(self.name, self.publisher)

    def to_json(self) -> dict[str, str | None]:
        """The ingredient as plain JSON values with stable keys."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "distribution": None if self.publisher is None else self.publisher.name,
            "version": None if self.publisher is None else self.publisher.version,
        }


def published(ingredients: Iterable[Ingredient]) -> list[str]:
    """The lines of a report that name the publishers: one for each file of a distribution."""
    return [f"with {one_line(each.title)}" for each in ingredients if each.publisher is not None]


@dataclass(frozen=True, slots=True, repr=False)
class Recipe(ShortRepr):
    """A recipe with its bases merged, after all checks that need no model.

    ``path`` is the file as it was named, ``reference`` what a recipe that extends this one would
    write; both are None for a text without a path. ``ingredients`` are the recipe itself and all
    its bases, nearest first. ``warnings`` are those that need no model.
    """

    name: str | None
    description: str | None
    phase: Phase
    backend: Backend
    tensors: Mapping[str, TensorSpec]
    qconfigs: Mapping[str, QConfigSpec]
    rules: tuple[Rule, ...]
    calibration: CalibrationTable = field(repr=False)
    qat: QatTable = field(repr=False)
    fx: FxTable = field(repr=False)
    lint: LintTable = field(repr=False)
    path: str | None
    reference: str | None
    fingerprint: str
    ingredients: tuple[Ingredient, ...]
    warnings: tuple[Finding, ...]
    _values: Mapping[str, Any] = field(hash=False, repr=False)
    _origins: Mapping[KeyPath, Location] = field(hash=False, repr=False)
    _constructors: Mapping[KeyPath, Location] = field(hash=False, repr=False)

    @property
    def settings(self) -> dict[tuple[str, ...], Any]:
        """Everything that the recipe and its bases set, as path -> value.

        Recipes with equal settings, except for reasons and the description, have the same
        fingerprint.
        """
        return dict(flattened(dict(self._values)))

    def origin(self, key: str) -> Location:
        """Where the value of a dotted key such as ``rules.module_name."layer1.0"`` was set.

        The quotes around a rule's key are optional.
        Raises UnknownNameError if no file sets it.
        """
        for path in (_key_path(key), tuple(key.split(".", 2))):
            if path in self._origins:
                return self._origins[path]
        known = [dotted(path) for path in self._origins]
        finding = Finding("QR107", f"no file sets {shown(key)}", hint=did_you_mean(key, known))
        raise UnknownNameError(finding)

    def tensor_key(self, rule: Rule, role: str, key: str) -> Location | None:
        """Where a rule's tensor sets ``key``, or otherwise its dtype.

        ``role`` is "weight" or "activation"; None if the rule has no such tensor.
        """
        tier = self._values["rules"][rule.tier]
        value = tier[rule.key] if rule.key else tier
        named = self._values.get("qconfig", {}).get(rule.label, value)
        path = ("tensor", named.get(role))
        return self._origins.get((*path, key)) or self._origins.get((*path, "dtype"))

    def argument_key(self, path: KeyPath) -> Location:
        """Where the key of a constructor's argument is written, or otherwise the table around it.

        ``path`` is ``("tensor", NAME, "observer" or "fake_quant", ARGUMENT)``.
        """
        return _nearest(self._origins, path)

    def argument_value(self, path: KeyPath) -> Location:
        """Like `argument_key`, but where the value is written."""
        return _nearest(self._constructors, path)

    def to_toml(self) -> str:
        """The resolved recipe as one file without ``extends``, with the same fingerprint."""
        return toml_text(self._values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_toml` to a file atomically.

        Raises RecipeReferenceError (QR001) if it cannot be written.
        """
        write_atomically(Path(path_text(path, "save takes a path")), self.to_toml())


def load_recipe(source: str | os.PathLike[str] | Recipe) -> Recipe:
    """Read and check a recipe: a path, ``builtin:NAME`` or ``DIST:NAME``.

    Raises RecipeError with all findings at once.
    """
    if isinstance(source, Recipe):
        return source
    text = path_text(
        source,
        "load_recipe takes a path or a reference",
        hint="plan, compile and quantize take the model first, then the recipe, then data",
    )
    if isinstance(source, str) and is_reference(text):
        return _composed(named_source(text), None, None, text)
    return _composed(existing_source(Path(text), text), None, text, text)


def parse_recipe(text: str, path: str | os.PathLike[str] | None = None) -> Recipe:
    """Check a recipe's text; with its ``path``, it can extend the files next to it.

    Raises RecipeError with all findings at once.
    """
    if not isinstance(text, str):
        kind = shown(type(text).__name__)
        message = f"parse_recipe takes a recipe as text, not {kind}"
        raise RecipeReferenceError(Finding("QR001", message, hint="load_recipe reads a file"))
    if path is None:
        return _composed(Source("<recipe>"), text, None, None)
    name = path_text(path, "path= of parse_recipe takes a path")
    return _composed(file_source(Path(name), name), text, name, name)


def _resolved(composition: Composition, path: str | None, reference: str | None) -> Recipe:
    values = composition.values
    table = RecipeTable.model_validate(values)
    findings = [*composition.findings, *findings_of(composition, table)]
    if findings:
        raise error_from(_in_order(findings, composition))
    assert table.backend is not None
    own = fingerprint(values)
    qconfigs = {
        name: _qconfig(table, qconfig.weight, qconfig.activation)
        for name, qconfig in table.qconfig.items()
    }
    return Recipe(
        name=table.name,
        description=table.description,
        phase=table.phase or "ptq",
        backend=table.backend,
        tensors=FrozenMapping(table.tensor),
        qconfigs=FrozenMapping(qconfigs),
        rules=tuple(_rule(composition, table, qconfigs, at, rule) for at, rule in rules_of(table)),
        calibration=table.calibration,
        qat=table.qat,
        fx=table.fx,
        lint=table.lint,
        path=path,
        reference=reference,
        fingerprint=own,
        ingredients=(
            _ingredient(composition.top, own),
            *(_ingredient(base, layer_fingerprint(base)) for base in composition.top.extended),
        ),
        warnings=tuple(
            finding
            for finding in _in_order(list(doubtful_findings(composition, table)), composition)
            if finding.code not in table.lint.ignore
        ),
        _values=values,
        _origins=_origins(composition),
        _constructors=_constructors(composition),
    )


def _in_order(findings: list[Finding], composition: Composition) -> list[Finding]:
    """Sorted by file, the outermost first, and by line."""
    files = {layer.name: index for index, layer in enumerate(composition.layers)}

    def place(finding: Finding) -> tuple[int, int, int]:
        at = finding.location
        return (0, 0, 0) if at is None else (files.get(at.file, len(files)), at.line, at.column)

    return sorted(dict.fromkeys(findings), key=place)


def _qconfig(table: RecipeTable, weight: str | None, activation: str | None) -> QConfigSpec:
    return QConfigSpec(
        weight=None if weight is None else table.tensor[weight],
        activation=None if activation is None else table.tensor[activation],
    )


def _rule(
    composition: Composition,
    table: RecipeTable,
    qconfigs: Mapping[str, QConfigSpec],
    path: KeyPath,
    rule: RuleTable,
) -> Rule:
    layer = composition.owner(path)
    qconfig: QConfigSpec | None
    if rule.qconfig is None:
        qconfig = _qconfig(table, rule.weight, rule.activation)
        roles = {"weight": rule.weight, "activation": rule.activation}
        label = " ".join(f"{role}={name}" for role, name in roles.items() if name is not None)
    else:
        qconfig = None if rule.qconfig == FLOAT else qconfigs[rule.qconfig]
        label = rule.qconfig
    tier: Tier = path[1]  # type: ignore[assignment]
    return Rule(
        tier=tier,
        key=str(path[2]) if len(path) > 2 else "",
        qconfig=qconfig,
        label=label,
        reason=rule.reason,
        expect=rule.expect,
        optional=rule.optional,
        location=layer.key(path),
        layer=_layer_name(composition, layer),
        overrides=frozenset(_layer_name(composition, base) for base in layer.extended),
    )


def _layer_name(composition: Composition, layer: Layer) -> str:
    """The layer's name, made unique if two files have the same name."""
    names = [other.name for other in composition.layers]
    return layer.name if names.count(layer.name) == 1 else identity(layer.source)


def _ingredient(layer: Layer, fingerprint: str) -> Ingredient:
    return Ingredient(layer.name, fingerprint, layer.source.publisher)


def _composed(source: Source, text: str | None, path: str | None, reference: str | None) -> Recipe:
    with few_suggestions():
        return _resolved(compose(source, text), path, reference)


def _origins(composition: Composition) -> dict[KeyPath, Location]:
    """Where each resolved value is written, including arguments of constructors."""
    return {
        path: setting.layer.key(path)
        for at, setting in composition.settings.items()
        for path in (at, *_inside(at, setting.value))
        if path in setting.layer.document.spans
    }


def _constructors(composition: Composition) -> dict[KeyPath, Location]:
    """Where observers and fake-quants and the values of their arguments are written."""
    return {
        path: setting.layer.value(path)
        for at, setting in composition.settings.items()
        if at[0] == "tensor" and at[-1] in ("observer", "fake_quant")
        for path in (at, *_inside(at, setting.value))
    }


def _nearest(places: Mapping[KeyPath, Location], path: KeyPath) -> Location:
    return next(places[path[:size]] for size in range(len(path), 0, -1) if path[:size] in places)


def _inside(path: KeyPath, value: Any) -> list[KeyPath]:
    return [(*path, key) for key in value] if isinstance(value, dict) else []


def _key_path(key: str) -> KeyPath:
    """A dotted key as TOML reads it; empty if it is not a key."""
    try:
        node: Any = tomli.loads(f"{key} = 0")
    except (tomli.TOMLDecodeError, RecursionError):
        return ()
    path = []
    while isinstance(node, dict) and len(node) == 1:
        ((step, node),) = node.items()
        path.append(step)
    return tuple(path)
