"""The lock file of a recipe and a model: the plan that was approved.

It has the outcome of every site, and what led to it: the recipe, its bases, the structure of the
model, the versions of torch and of plugins. Only a changed outcome is a failure; the other changes
are shown as possible causes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
import torch
from pydantic import Field, ValidationError

from qrecipe._version import __version__
from qrecipe.errors.findings import PlanError
from qrecipe.errors.text import first_problem, one_line, shown
from qrecipe.files import write_atomically
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.plan_values import spec_values
from qrecipe.planning.text import decided_by, kept_by, place_of
from qrecipe.recipe.recipe import Ingredient
from qrecipe.recipe.references import is_reference
from qrecipe.recipe.schema import Constructor, Phase, Table, TensorSpec
from qrecipe.recipe.tensor_checks import is_static_integer
from qrecipe.recipe.toml.positions import MAX_DEPTH
from qrecipe.recipe.toml.size_limits import item_count, longest_key, outline
from qrecipe.recipe.toml.writer import LOCK_SUFFIX, toml_key, toml_value
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import Kind
from qrecipe.registry.entry_points import claims
from qrecipe.rules.structure import ModelStructure

LOCK_FORMAT: Literal[1] = 1
MAX_BYTES = 2**22
"""The largest lock file that is read: 4 MiB."""

MAX_ITEMS = 60_000
"""The most keys and array elements of a lock file: some 8,000 sites."""

WHOLE = ("backend", "phase", "boundaries")
"""The outcome of a plan as a whole."""

_HEAD = """\
# Written by `qrecipe lock` and checked by `qrecipe plan --check`. Commit it, and review its
# changes. To accept a changed plan, run `qrecipe lock` again.
"""


class LockedIngredient(Table):
    """A recipe that the plan came from; file names are relative to the lock file's folder."""

    name: str
    fingerprint: str
    distribution: str | None = None
    version: str | None = None


class LockedPlugin(Table):
    """A registered class that the plan uses, and its distribution, if any."""

    class_: Annotated[str, Field(alias="class")]
    distribution: str | None = None
    version: str | None = None


class Lock(Table):
    """The contents of a lock file: the outcome of a plan, and what it was made from.

    ``plugins`` are named ``observer NAME``, ``fake_quant NAME`` and ``transform NAME``;
    ``structure`` is a fingerprint of the model's operations and modules, whatever their weights;
    ``transforms`` says what they change.
    """

    lock: Literal[1]
    qrecipe: str
    torch: str
    recipe: LockedIngredient
    bases: Annotated[tuple[LockedIngredient, ...], Field(strict=False)] = ()
    plugins: dict[str, LockedPlugin] = Field(default_factory=dict)
    structure: str
    backend: str
    phase: str
    executor: str
    boundaries: int
    transforms: dict[str, str] = Field(default_factory=dict)
    sites: dict[str, SiteOutcome]


def lock_path(recipe: str) -> Path:
    """The lock file of a recipe: next to its file, or for a reference in the current folder."""
    if is_reference(recipe):
        return Path(recipe.partition(":")[2] + LOCK_SUFFIX)
    return Path(recipe.removesuffix(".toml") + LOCK_SUFFIX)


def make_lock(plan: Plan, path: Path) -> Lock:
    """The lock of a plan, for a file at ``path``."""
    recipe, *bases = (_locked(each, path) for each in plan.ingredients)
    return Lock(
        lock=LOCK_FORMAT,
        qrecipe=__version__,
        torch=str(torch.__version__),
        recipe=recipe,
        bases=tuple(bases),
        plugins=dict(sorted(_plugins(plan))),
        structure=structure_fingerprint(plan.structure),
        executor=plan.executor,
        **{name: getattr(plan, name) for name in WHOLE},
        transforms=transform_outcomes(plan),
        sites={site.name: site_outcome(site, plan.phase) for site in plan},
    )


def is_lock(path: Path) -> bool:
    """Whether a file is a lock, even a damaged one."""
    try:
        # a pipe would be waited for
        return path.is_file() and path.read_text(encoding="utf-8").startswith(_HEAD)
    except (OSError, ValueError):
        return False


def write_lock(plan: Plan, path: Path) -> None:
    """Write the lock of a plan atomically.

    Raises RecipeReferenceError (QR001) if it cannot be written, PlanError (QR321) if it would be
    too large to be read.
    """
    text = lock_text(make_lock(plan, path))
    if len(text.encode()) > MAX_BYTES or item_count(outline(text)) > MAX_ITEMS:
        raise PlanError.of("QR321", "the plan has too many sites for a lock file")
    write_atomically(path, text)


def lock_text(lock: Lock) -> str:
    """A lock as TOML in a stable order, one line per site, so that diffs are readable."""
    values = lock.model_dump(by_alias=True, exclude_none=True)
    bases = [f"    {toml_value(base)}," for base in values["bases"]]
    lines = [
        *(f"{key} = {toml_value(values[key])}" for key in ("lock", "qrecipe", "torch", "recipe")),
        *(["bases = [", *bases, "]"] if bases else []),
        *(f"{key} = {toml_value(values[key])}" for key in ("structure", "executor", *WHOLE)),
    ]
    for name in ("plugins", "transforms", "sites"):
        rows = [f"{toml_key(key)} = {toml_value(value)}" for key, value in values[name].items()]
        lines += ["", f"[{name}]", *rows] if rows or name == "sites" else []
    return _HEAD + "\n".join(lines) + "\n"


def read_lock(path: Path) -> Lock:
    """The lock file at ``path``.

    Raises PlanError if there is none (QR320), it is damaged (QR321), or a newer qrecipe wrote it
    (QR322).
    """
    try:
        data = _toml(_content(path).decode("utf-8"))
    except UnicodeDecodeError:
        raise _damaged(path, "it is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # ValueError: TOML syntax, a number too long
        raise _damaged(path, str(error)) from None
    version = data.get("lock")
    if type(version) is int and version > LOCK_FORMAT:
        message = f"{shown(str(path))} has format {version}, which a newer qrecipe wrote"
        hint = f"qrecipe {__version__} reads format {LOCK_FORMAT}"
        raise PlanError.of("QR322", message, hint=hint)
    try:
        return Lock.model_validate(data)
    except ValidationError as error:
        raise _damaged(path, first_problem(error)) from None


def _toml(text: str) -> dict[str, Any]:
    structure = outline(text)
    if item_count(structure) > MAX_ITEMS or longest_key(structure) > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_ITEMS:,} keys and values, or is nested too deeply")
    return tomli.loads(text)


def structure_fingerprint(structure: ModelStructure) -> str:
    """The SHA-256 of a model's operations, how they are connected, and its modules' classes."""
    operations = [
        {
            "members": [[member.name, member.op] for member in operation.members],
            "kind": operation.kind,
            "producers": operation.producers,
            "model_inputs": operation.model_inputs,
            "stored": operation.stored,
            "is_output": operation.is_output,
        }
        for operation in structure.operations
    ]
    # without the modules that define the classes: a file's path differs between machines
    classes = {
        path: sorted({name.rpartition(".")[2] for name in types})
        for path, types in structure.modules.items()
    }
    values = {"operations": operations, "modules": classes, "roots": structure.roots}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise _damaged(path, f"it is larger than {MAX_BYTES:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        message = f"there is no lock file {shown(str(path))}"
        hint = "write it with `qrecipe lock`, and commit it"
        raise PlanError.of("QR320", message, hint=hint) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from None


def _damaged(path: Path, why: str) -> PlanError:
    message = f"{shown(str(path))} is not a valid lock file: {one_line(why)[:200]}"
    hint = "write it again with `qrecipe lock --force`"
    return PlanError.of("QR321", message, hint=hint)


def _locked(ingredient: Ingredient, path: Path) -> LockedIngredient:
    name = ingredient.name
    if ingredient.publisher is None and not is_reference(name):
        name = os.path.relpath(os.path.abspath(name), os.path.abspath(path.parent))
        name = Path(name).as_posix()
    return LockedIngredient.model_validate({**ingredient.to_json(), "name": name})


def _plugins(plan: Plan) -> Iterator[tuple[str, LockedPlugin]]:
    """The registered classes that the plan uses; fake-quants only if it is for training."""
    qconfigs = (site.qconfig for site in plan.sites if site.qconfig is not None)
    specs = {spec for each in qconfigs for spec in (each.weight, each.activation) if spec}
    kinds: tuple[Kind, ...] = ("observer", "fake_quant") if plan.phase == "qat" else ("observer",)
    constructors = {kind: (getattr(spec, kind) for spec in specs) for kind in kinds}
    used = {kind: {each.name for each in some if each} for kind, some in constructors.items()}
    for kind, names in {**used, "transform": {step.name for step in plan.steps}}.items():
        for name in names:
            registration = registered.find(kind, name)
            if registration is not None:
                values = {"class": registration.signature.target, **_distribution(registration)}
                yield f"{kind} {name}", LockedPlugin.model_validate(values)


def _distribution(registration: registered.Registration) -> dict[str, str]:
    """The distribution that claims the name or else contains the class, and its version."""
    for claim in claims(registration.kind, registration.name):
        return {"distribution": claim.distribution, "version": claim.version}
    package = registration.cls.__module__.partition(".")[0]
    owners = _owners(tuple(sys.path)).get(package, ())
    return {"distribution": owners[0], "version": version(owners[0])} if owners else {}


@cache
def _owners(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """The distributions of each top-level package; to read them all takes half a second."""
    return packages_distributions()


_DEFAULT_FAKE_QUANT = Constructor(name="fake_quantize")


class SiteOutcome(Table):
    """The outcome for one site; ``by`` names the deciding rule, which does not count as outcome.

    ``input`` says that a float input is quantized first; ``engine`` is set if another engine than
    the backend's packs the weights.
    """

    op: str
    verdict: str
    weight: str | None = None
    activation: str | None = None
    input: str | None = None
    engine: str | None = None
    by: str

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.activation is None

    def parts(self) -> dict[str, str]:
        """The outcome without the rule and without values that are None."""
        return self.model_dump(exclude_none=True, exclude={"by"})


def site_outcome(site: Site, phase: Phase) -> SiteOutcome:
    """The outcome for a site of a plan of this phase."""
    qconfig = site.qconfig
    mode = f" {site.mode}" if site.mode is not None and site.verdict == "quantized" else ""
    return SiteOutcome(
        op=site.op,
        verdict=site.verdict + mode,
        weight=None if qconfig is None else _spec(qconfig.weight, phase),
        activation=None if qconfig is None else _spec(qconfig.activation, phase),
        input=None if site.input is None else "float, quantized here",
        engine=site.engine,
        by=decided_by(site.rule),
    )


def transform_outcomes(plan: Plan) -> dict[str, str]:
    """What transforms change, and up to where or in which way."""
    chains = {f"chain {' > '.join(each.sites)}": f"ends: {each.end}" for each in plan.chains}
    groups = {
        f"group {', '.join(each.sites)}": f"divided by {place_of(each)}" for each in plan.groups
    }
    steps = {f"transform {each.name}": f"keeps the outputs {kept_by(each)}" for each in plan.steps}
    return {**chains, **groups, **steps}


def _spec(spec: TensorSpec | None, phase: Phase) -> str | None:
    """A spec in one line: dtype, observer, qscheme, and whatever else is set."""
    if spec is None:
        return None
    values = spec_values(spec)
    observer = None if spec.observer is None else _constructor(spec.observer)
    head = [spec.dtype, observer, spec.qscheme]
    rest = {
        key: value
        for key, value in values.items()
        if key not in ("dtype", "observer", "qscheme", "fake_quant") and value is not False
    }
    words = [word for word in head if word is not None]
    words += [key if value is True else f"{key}={value}" for key, value in rest.items()]
    if phase == "qat" and is_static_integer(spec):
        words.append(f"fake_quant={_constructor(spec.fake_quant or _DEFAULT_FAKE_QUANT)}")
    return " ".join(words)


def _constructor(constructor: Constructor) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in sorted(constructor.arguments.items()))
    return f"{constructor.name}({arguments})" if arguments else constructor.name
