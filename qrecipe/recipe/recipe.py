"""A recipe as a value: loaded, checked, resolved and written back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

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
from qrecipe.files import path_text, write_atomically
from qrecipe.recipe.checks import doubtful_findings, findings_of, rules_of
from qrecipe.recipe.extends import Composition, compose, identity
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.layers import layer_fingerprint
from qrecipe.recipe.references import (
    Publisher,
    Source,
    existing_source,
    file_source,
    is_reference,
    named_source,
    titled,
)
from qrecipe.recipe.schema import (
    FLOAT,
    Backend,
    CalibrationTable,
    Executor,
    FxTable,
    LintTable,
    Phase,
    QatTable,
    QConfigTable,
    RecipeTable,
    RuleTable,
    TensorSpec,
    TransformTable,
)
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.toml.writer import toml_text
from qrecipe.recipe.validation import dotted

Tier = Literal["module_name", "module_type", "function", "global"]


@dataclass(frozen=True, slots=True)
class QConfigSpec:
    """The specs of a weight and an activation; None means not quantized."""

    weight: TensorSpec | None
    activation: TensorSpec | None

    @property
    def rounds_results(self) -> bool:
        """Whether results are rounded as well as what is read, where ranges are static."""
        return self.activation is not None and not self.activation.inputs_only


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

    def __hash__(self) -> int:
        return hash((self.tier, self.key, self.label))

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

    __hash__ = WrittenRule.__hash__

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

    ``executor`` is None if it is chosen for each model. ``path`` is the file as it was named,
    ``reference`` what a recipe that extends this one would
    write; both are None for a text without a path. ``ingredients`` are the recipe itself and all
    its bases, nearest first. ``warnings`` are those that need no model.
    """

    name: str | None
    description: str | None
    phase: Phase
    backend: Backend
    executor: Executor | None
    tensors: Mapping[str, TensorSpec]
    qconfigs: Mapping[str, QConfigSpec]
    rules: tuple[Rule, ...]
    transform: TransformTable = field(repr=False)
    calibration: CalibrationTable = field(repr=False)
    qat: QatTable = field(repr=False)
    fx: FxTable = field(repr=False)
    lint: LintTable = field(repr=False)
    path: str | None
    reference: str | None
    fingerprint: str
    ingredients: tuple[Ingredient, ...]
    warnings: tuple[Finding, ...]
    _composition: Composition = field(compare=False, repr=False)

    @property
    def settings(self) -> dict[tuple[str, ...], Any]:
        """Everything that the recipe and its bases set, as path -> value.

        Recipes with equal settings, except for reasons and the description, have the same
        fingerprint.
        """
        return {path: setting.value for path, setting in self._composition.settings.items()}

    def origin(self, key: str) -> Location:
        """Where the value of a dotted key such as ``rules.module_name."layer1.0"`` was set.

        The quotes around a rule's key are optional.
        Raises UnknownNameError if no file sets it.
        """
        for path in (_key_path(key), tuple(key.split(".", 2))):
            if path and self._composition.sets(path):
                return self._composition.owner(path).key(path)
        known = map(dotted, self._composition.paths)
        finding = Finding("QR107", f"no file sets {shown(key)}", hint=did_you_mean(key, known))
        raise UnknownNameError(finding)

    def tensor_key(self, rule: Rule, role: str, key: str) -> Location | None:
        """Where a rule's tensor sets ``key``, or otherwise its dtype.

        ``role`` is "weight" or "activation"; None if the rule has no such tensor.
        """
        settings = self._composition.settings
        place = ("rules", rule.tier, rule.key) if rule.key else ("rules", rule.tier)
        value = settings[place].value
        named = settings.get(("qconfig", rule.label, role))
        tensor = value.get(role) if named is None else named.value
        for path in (("tensor", tensor, each) for each in (key, "dtype")):
            if path in settings:
                return settings[path].layer.key(path)
        return None

    def argument_key(self, path: KeyPath) -> Location:
        """Where the key of a constructor's argument is written, or otherwise the table around it.

        ``path`` is ``("tensor", NAME, "observer" or "fake_quant", ARGUMENT)``.
        """
        return self._composition.owner(path).key(path)

    def argument_value(self, path: KeyPath) -> Location:
        """Like `argument_key`, but where the value is written."""
        return self._composition.owner(path).value(path)

    def to_toml(self) -> str:
        """The resolved recipe as one file without ``extends``, with the same fingerprint."""
        return toml_text(self._composition.values)

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
        raise RecipeReferenceError.of("QR001", message, hint="load_recipe reads a file")
    if path is None:
        return _composed(Source("<recipe>"), text, None, None)
    name = path_text(path, "path= of parse_recipe takes a path")
    return _composed(file_source(Path(name), name), text, name, name)


def _composed(source: Source, text: str | None, path: str | None, reference: str | None) -> Recipe:
    with few_suggestions():
        return _resolved(compose(source, text), path, reference)


def _resolved(composition: Composition, path: str | None, reference: str | None) -> Recipe:
    values = composition.values
    table = RecipeTable.model_validate(values)
    findings = [*composition.findings, *findings_of(composition, table)]
    if findings:
        raise error_from(_in_order(findings, composition))
    assert table.backend is not None
    layers = {layer: layer_fingerprint(layer) for layer in composition.layers}
    doubtful = _in_order(doubtful_findings(composition, table), composition)
    return Recipe(
        name=table.name,
        description=table.description,
        phase=table.phase or "ptq",
        backend=table.backend,
        executor=table.executor,
        tensors=FrozenMapping(table.tensor),
        qconfigs=FrozenMapping(
            {name: _qconfig(table, qconfig) for name, qconfig in table.qconfig.items()}
        ),
        rules=tuple(rules_in(composition, table)),
        transform=table.transform,
        calibration=table.calibration,
        qat=table.qat,
        fx=table.fx,
        lint=table.lint,
        path=path,
        reference=reference,
        fingerprint=layers[composition.top],
        ingredients=tuple(
            Ingredient(layer.name, own, layer.source.publisher) for layer, own in layers.items()
        ),
        warnings=tuple(each for each in doubtful if each.code not in table.lint.ignore),
        _composition=composition,
    )


def _in_order(findings: Iterable[Finding], composition: Composition) -> list[Finding]:
    """Sorted by file, the outermost first, and by line."""
    files = {layer.name: index for index, layer in enumerate(composition.layers)}

    def place(finding: Finding) -> tuple[int, int, int]:
        at = finding.location
        return (0, 0, 0) if at is None else (files.get(at.file, len(files)), at.line, at.column)

    return sorted(dict.fromkeys(findings), key=place)


def _qconfig(table: RecipeTable, roles: QConfigTable | RuleTable) -> QConfigSpec:
    return QConfigSpec(
        weight=None if roles.weight is None else table.tensor[roles.weight],
        activation=None if roles.activation is None else table.tensor[roles.activation],
    )


def rules_in(composition: Composition, table: RecipeTable) -> Iterator[Rule]:
    """The rules of a resolved recipe, without findings."""
    layers = composition.layers
    times = Counter(layer.name for layer in layers)
    # unique, even if two files have the same name
    names = {each: each.name if times[each.name] == 1 else identity(each.source) for each in layers}
    overrides = {layer: frozenset(map(names.__getitem__, layer.extended)) for layer in layers}
    for path, rule in rules_of(table):
        layer = composition.owner(path)
        roles = {"weight": rule.weight, "activation": rule.activation}
        label = " ".join(f"{role}={name}" for role, name in roles.items() if name is not None)
        decides = table.qconfig.get(rule.qconfig, rule) if rule.qconfig else rule
        yield Rule(
            tier=cast(Tier, path[1]),
            key=str(path[2]) if len(path) > 2 else "",
            qconfig=None if rule.qconfig == FLOAT else _qconfig(table, decides),
            label=rule.qconfig or label,
            reason=rule.reason,
            expect=rule.expect,
            optional=rule.optional,
            location=layer.key(path),
            layer=names[layer],
            overrides=overrides[layer],
        )


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
