"""What quantized models carry as texts: recipe, plan, versions, needs, and how tensors are stored.

It is untrusted text until it has been checked here. Nothing imports torch.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from qrecipe.artifact.container import MAX_VALUES, Header, StoredFile, json_of, problem
from qrecipe.errors.findings import ArtifactError, PlanError, QRecipeError
from qrecipe.errors.text import first_problem
from qrecipe.model.record import Architecture, Stored
from qrecipe.planning.plan import Plan
from qrecipe.recipe.checks import findings_of
from qrecipe.recipe.extends import compose
from qrecipe.recipe.layers import fingerprint
from qrecipe.recipe.recipe import Rule, rules_in
from qrecipe.recipe.references import Source
from qrecipe.recipe.schema import RecipeTable
from qrecipe.recipe.toml.document import parse_document
from qrecipe.recipe.toml.size_limits import json_count

FORMAT = 1
"""The version of the texts; tensors are safetensors in every version."""

MAX_TEXT = 2**23
"""The largest text that is unpacked: 8 MiB."""

_MARK = "qrecipe"
_UNKNOWN_PLUGIN = "QR104"
_PACKED = frozenset({"plan", "architecture"})
_TABLES = ("versions", "needs", "architecture", "aliases", "layouts", "unjudged")


class Needs(Stored):
    """What the machine that runs the model has to have.

    ``engines`` are those of torch, the backend's own and those of single sites; ``vnni`` tells
    that the kernels can saturate on an x86 CPU without VNNI.
    """

    engines: tuple[str, ...]
    vnni: bool


class Origin(Stored):
    """Where a quantized model comes from.

    ``recipe`` is TOML; ``plan`` is the output of ``Plan.to_json``, unpacked. ``cpu`` is the kind of
    CPU that converted the model, ``unjudged`` the sites that it could not check with all 8 bits.
    """

    recipe: str
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    plan: str
    versions: dict[str, str]
    needs: Needs
    cpu: str = ""
    unjudged: tuple[str, ...] = ()


class Contents(Origin):
    """The metadata of a stored model.

    ``aliases`` maps a name to the one under which the same tensor is stored; ``layouts`` has the
    order of dimensions in memory, outermost first, of tensors that are not contiguous.
    """

    architecture: Architecture
    aliases: dict[str, str] = Field(default_factory=dict)
    layouts: dict[str, tuple[int, ...]] = Field(default_factory=dict)


_Kind = TypeVar("_Kind", bound=Origin)


def texts_of(origin: Origin) -> dict[str, str]:
    """The origin as strings, which is what safetensors metadata hold."""
    plain: dict[str, Any] = origin.model_dump(mode="json")
    texts = {key: value if isinstance(value, str) else _json(value) for key, value in plain.items()}
    texts["plan"] = _json(json.loads(origin.plan))
    return {
        "format": f"{_MARK} {FORMAT}",
        **{key: _packed(text) if key in _PACKED else text for key, text in texts.items()},
    }


def origin_of(kind: type[_Kind], texts: Mapping[str, str], file: str) -> _Kind:
    """What `texts_of` made of an origin, or of more than that.

    Raises ArtifactError if it is not of qrecipe (QR505), is from a newer release (QR506), or is
    damaged (QR505).
    """
    mark, _, version = texts.get("format", "").partition(" ")
    if mark != _MARK or not version.isdecimal():
        hint = "only files written by qrecipe.save_quantized can be read"
        raise problem("QR505", file, "is not a quantized model of qrecipe", hint)
    if version != str(FORMAT):
        hint = f"this qrecipe reads format {FORMAT}: install a newer release"
        raise problem("QR506", file, f"has format {version}", hint)
    given = {key: texts.get(key, "[]" if key == "unjudged" else "") for key in kind.model_fields}
    tables = [key for key in _TABLES if key in given]
    try:
        values: dict[str, Any] = {
            key: _unpacked(text) if key in _PACKED else text for key, text in given.items()
        }
        if sum(json_count(values[key]) for key in ("plan", *tables)) > MAX_VALUES:
            raise ValueError(f"they have more than {MAX_VALUES:,} values")
        for key in tables:
            values[key] = json_of(values[key])
        values["plan"] = json.dumps(json_of(values["plan"]), indent=2, sort_keys=True)
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise bad(file, first_problem(error)) from None
    except (ValueError, zlib.error, RecursionError) as error:
        raise bad(file, str(error)) from None


def needs_of(plan: Plan) -> Needs:
    """What a machine needs for the model of a plan."""
    return Needs(
        engines=tuple(dict.fromkeys([plan.backend, *plan.engines.values()])), vnni=plan.needs_vnni
    )


@dataclass(frozen=True, slots=True)
class Checked:
    """The plan and the recipe of an origin, which fit each other."""

    plan: Plan
    recipe: RecipeTable
    rules: tuple[Rule, ...]


def checked(origin: Origin, file: str) -> Checked:
    """Raises ArtifactError (QR505) if the parts contradict each other."""
    plan = _plan(file, origin)
    recipe, rules = _recipe(file, origin)
    for what, one, other in (
        ("backend", plan.backend, recipe.backend),
        ("phase", plan.phase, recipe.phase or "ptq"),
    ):
        if one != other:
            raise bad(file, f"{what} is {one} in the plan and {other} in the recipe")
    return Checked(plan, recipe, rules)


def _plan(file: str, origin: Origin) -> Plan:
    try:
        plan = Plan.from_json(origin.plan)
    except PlanError as error:
        raise bad(file, error.findings[0].message) from None
    if plan.fingerprint != origin.fingerprint:
        raise bad(file, "the plan was made from another recipe")
    if needs_of(plan) != origin.needs:
        raise bad(file, "the needs are not those of the plan")
    names = {site.name for site in plan}
    unknown = [name for name in origin.unjudged if name not in names]
    if unknown or (origin.unjudged and not plan.needs_vnni):
        raise bad(file, "unjudged: the plan has no such sites")
    return plan


def _recipe(file: str, origin: Origin) -> tuple[RecipeTable, tuple[Rule, ...]]:
    """The recipe's tables and rules: all checks of a recipe, but plugins may be missing here."""
    try:
        if "extends" in parse_document(origin.recipe, "recipe").data:
            raise bad(file, "the recipe is not resolved: it extends another recipe")
        composition = compose(Source("recipe"), origin.recipe)
    except QRecipeError as error:
        raise bad(file, f"recipe: {error.findings[0].message}") from None
    table = RecipeTable.model_validate(composition.values)
    for finding in (*composition.findings, *findings_of(composition, table)):
        if finding.code != _UNKNOWN_PLUGIN:
            raise bad(file, f"recipe: {finding.message}")
    if fingerprint(composition.values) != origin.fingerprint:
        raise bad(file, "the recipe does not match its fingerprint")
    return table, tuple(rules_in(composition, table))


def bad(file: str, what: str) -> ArtifactError:
    """The error about metadata that are damaged or contradict each other."""
    return problem("QR505", file, f"has bad metadata: {what}")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _unpacked(text: str) -> str:
    """Raises ValueError or zlib.error unless `_packed` made the text and it is short enough."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TEXT)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError(f"a text has more than {MAX_TEXT:,} bytes or is truncated")
    return content.decode()


def contents_of(header: Header) -> Contents:
    """The contents of a file's metadata.

    Raises ArtifactError if it is not a file of qrecipe (QR505), is from a newer release (QR506), or
    the metadata are damaged or contradict each other (QR505).
    """
    found = origin_of(Contents, header.metadata, header.file)
    _check_names(header, found)
    return found


@dataclass(frozen=True, slots=True)
class StoredModel(Checked):
    """A stored model without its tensors, checked as far as possible without the float model."""

    header: Header
    contents: Contents


def stored_model(file: StoredFile) -> StoredModel:
    """What a file says, before its tensors have been read: `StoredFile.check` does that.

    Raises ArtifactError: as `contents_of`; if the parts contradict each other (QR505), or do so
    because the checksum differs (QR504).
    """
    contents = contents_of(file.header)
    with file.damage_first():
        found = checked(contents, file.header.file)
    return StoredModel(found.plan, found.recipe, found.rules, file.header, contents)


def _check_names(header: Header, contents: Contents) -> None:
    """Check that aliases and layouts refer to stored tensors."""
    for name, stored in contents.aliases.items():
        if name in header.tensors or stored not in header.tensors:
            raise bad(header.file, f"aliases: {name} refers to no stored tensor")
    for name, order in contents.layouts.items():
        entry = header.tensors.get(name)
        if entry is None or sorted(order) != list(range(len(entry.shape))):
            raise bad(header.file, f"layouts: {name} has no such dimensions")
