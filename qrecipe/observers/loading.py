"""Plugins of installed distributions, imported when a recipe names them.

All problems of a plugin are findings at the line of the recipe that name its distribution. What a
plugin registered before it failed is undone.
"""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch

from qrecipe.errors.findings import Finding, Location, QRecipeError, error_from
from qrecipe.errors.text import first_line, one_line, shown
from qrecipe.errors.warn import warn
from qrecipe.observers.qconfig import factory
from qrecipe.observers.registration import created
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import Constructor, Phase, TensorSpec
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.validation import MAX_FINDINGS
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import KIND_TITLE, ArgumentProblem, Kind
from qrecipe.registry.builtin import BUILTIN, check_arguments
from qrecipe.registry.entry_points import Claim, claims
from qrecipe.registry.table import Registration

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_LONGEST_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class _Use:
    """A name in a recipe that may be a plugin's, and its arguments.

    ``owner`` is the path of the table that the arguments are in; ``create`` creates what is named.
    """

    kind: Kind
    name: str
    arguments: Mapping[str, Any]
    owner: KeyPath
    create: Callable[[], object]

    @property
    def is_builtin(self) -> bool:
        return self.name in BUILTIN[self.kind]

    def place(self, recipe: Recipe) -> Location:
        """Where the name is written."""
        if self.kind == "transform":
            return recipe.argument_key(self.owner)
        return recipe.argument_value((*self.owner, "name"))


def load_plugins(recipe: Recipe) -> None:
    """Import the plugins that a recipe names, and check the arguments that it gives them.

    Raises:
        PluginError: a plugin is broken (QR150 to QR155).
        UnknownNameError, SchemaError, UnsupportedError: a name (QR104) or an argument (QR105,
            QR106) is wrong, or the class rejects its arguments (QR311).
    """
    for use in _uses(recipe):
        for finding in _shadowed(use.kind, use.name) if use.is_builtin else ():
            warn(replace(finding, location=use.place(recipe)), recipe.lint.ignore)
    uses = [use for use in _uses(recipe) if not use.is_builtin]
    findings = {use.owner: list(_findings(recipe, use)) for use in uses}
    spoilt = {owner[:2] for owner, found in findings.items() if found}
    for use in uses:
        if use.owner[:2] not in spoilt:
            findings[use.owner] += _refusals(recipe, use)
    found = list(islice(chain.from_iterable(findings.values()), MAX_FINDINGS))
    if found:
        raise error_from(found)


def plugin_versions(recipe: Recipe) -> Mapping[str, str]:
    """The distributions of the plugins that a recipe names, and their versions."""
    uses = (use for use in _uses(recipe) if not use.is_builtin)
    found = [claim for use in uses for claim in claims(use.kind, use.name)]
    return {claim.distribution: claim.version for claim in found}


def registered_for(recipe: Recipe) -> tuple[tuple[Kind, str, str], ...]:
    """Kind, name and module of each class registered in Python that a recipe names."""
    found = (registered.find(use.kind, use.name) for use in _uses(recipe))
    return tuple(dict.fromkeys((e.kind, e.name, e.module) for e in found if e is not None))


def load(kind: Kind, name: str) -> tuple[Finding, ...]:
    """Import the plugin that claims a name, if any, and return its findings.

    A failed plugin is not tried again in this process: the second import might fail differently.
    """
    claimed = claims(kind, name)
    if len(claimed) > 1:
        return (_contested(kind, name, claimed),)
    return _load(claimed[0]) if claimed else ()


def _uses(recipe: Recipe) -> Iterator[_Use]:
    for tensor, spec in recipe.tensors.items():
        for kind, phase in _PHASES:
            constructor: Constructor | None = getattr(spec, kind)
            if constructor is not None:
                owner = ("tensor", tensor, kind)
                create = partial(_create, spec, phase)
                yield _Use(kind, constructor.name, constructor.arguments, owner, create)
    for name, table in recipe.transform.plugins.items():
        create = partial(created, "transform", name, table.arguments)
        yield _Use("transform", name, table.arguments, ("transform", name), create)


_PHASES: tuple[tuple[Kind, Phase], ...] = (("observer", "ptq"), ("fake_quant", "qat"))
"""In which torch creates what a tensor names."""


def _create(spec: TensorSpec, phase: Phase) -> object:
    return factory(spec, phase)()


def _shadowed(kind: Kind, name: str) -> Iterator[Finding]:
    """Warnings about plugins that claim a name of torch's own."""
    for claim in claims(kind, name):
        message = f"{_title(claim)} is built in, although {claim} claims it"
        hint = f"uninstall {claim.distribution}, or ignore QR156 in [lint]"
        yield Finding("QR156", message, hint=hint)


def _findings(recipe: Recipe, use: _Use) -> Iterator[Finding]:
    """The problems of the plugin, or otherwise of its arguments."""
    broken = load(use.kind, use.name)
    for finding in broken:
        yield replace(finding, location=use.place(recipe))
    if broken:
        return
    for problem in check_arguments(use.kind, use.name, use.arguments):
        at = _place(recipe, use, problem)
        yield Finding(problem.code, problem.message, at, problem.hint)


def _place(recipe: Recipe, use: _Use, problem: ArgumentProblem) -> Location:
    if problem.argument is None:
        return use.place(recipe)
    path = (*use.owner, problem.argument)
    return recipe.argument_key(path) if problem.code == "QR105" else recipe.argument_value(path)


def _refusals(recipe: Recipe, use: _Use) -> Iterator[Finding]:
    """Why the class itself rejects its arguments; it is created once to find out."""
    try:
        use.create()
    except (Exception, SystemExit) as error:
        why = one_line(first_line(error))[:_LONGEST_MESSAGE]
        message = f"{KIND_TITLE[use.kind]} {shown(use.name)} cannot be created: {why}"
        hint = "fix the arguments or the settings of its tensor"
        yield Finding("QR311", message, recipe.argument_value(use.owner), hint)


_failed: dict[Claim, tuple[Finding, ...]] = {}


def _load(claim: Claim) -> tuple[Finding, ...]:
    if claim in _failed:
        return _failed[claim]
    before = registered.snapshot()
    try:
        found = tuple(_import(claim)) or tuple(_registration_findings(claim, before))
    except BaseException:
        registered.restore(before)
        raise
    _failed.pop(claim, None)  # from a plan that the plugin made during its import
    if found:
        registered.restore(before)
        _failed[claim] = found
    return found


def _import(claim: Claim) -> Iterator[Finding]:
    if not _MODULE.fullmatch(claim.module):
        message = f"{_subject(claim)} should name a module, not {shown(claim.module)}"
        hint = f'write "{claim.kind}.{claim.name}" = "package.module" in its entry points'
        yield Finding("QR152", message, hint=hint)
        return
    try:
        # or the first plan would differ from the second; not `random_numbers_kept`, whose lock
        # could deadlock with the import lock of another thread that imports the plugin
        with torch.random.fork_rng(devices=[]):
            importlib.import_module(claim.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything, even SystemExit
        yield from _import_findings(claim, error)


def _import_findings(claim: Claim, error: BaseException) -> Iterator[Finding]:
    """The findings of a refused registration, or otherwise the exception."""
    own = error.findings if isinstance(error, QRecipeError) else ()
    refused = [finding for finding in own if isinstance(finding, Finding)]
    for finding in refused:
        code = finding.code if finding.code in ("QR150", "QR151") else "QR152"
        yield Finding(code, f"{_subject(claim)}: {finding.message}", hint=finding.hint)
    if not refused:
        said = one_line(f"{type(error).__name__}: {first_line(error)}")[:_LONGEST_MESSAGE]
        message = f"{_subject(claim)} cannot be imported: {said}"
        hint = f"fix or uninstall {claim.distribution}; recipes that do not use it are not affected"
        yield Finding("QR152", message, hint=hint, notes=_raised_at(error))


def _registration_findings(claim: Claim, before: registered.Table) -> Iterator[Finding]:
    key = claim.kind, claim.name
    mine = registered.find(*key)
    new = [entry for at, entry in registered.snapshot().items() if before.get(at) is not entry]
    if mine is None:
        others = ", ".join(f"{KIND_TITLE[entry.kind]} {shown(entry.name)}" for entry in new)
        hint = f"it registers {others}" if others else "it registers nothing"
        message = f"{_subject(claim)}: importing {claim.module} does not register {_title(claim)}"
        yield Finding("QR153", message, hint=hint)
    elif before.get(key) is mine and not _is_from(mine, claim):
        message = f"{_subject(claim)}: {mine.module} has already registered that name"
        yield Finding("QR151", message, hint="give one of them another name")
    for entry in new:
        owners = claims(entry.kind, entry.name)
        if owners and not any(
            owner.distribution == claim.distribution or _is_from(entry, owner) for owner in owners
        ):
            taken = f"{KIND_TITLE[entry.kind]} {shown(entry.name)}"
            message = f"{_subject(claim)}: it also registers {taken}, which belongs to {owners[0]}"
            yield Finding("QR155", message, hint=f"fix or uninstall {claim.distribution}")


def _is_from(entry: Registration, claim: Claim) -> bool:
    """Whether it was registered by the package that the claim names."""
    return entry.module.partition(".")[0] == claim.module.partition(".")[0]


def _contested(kind: Kind, name: str, claimed: tuple[Claim, ...]) -> Finding:
    claimants = " and by ".join(f"{claim} ({claim.module})" for claim in claimed)
    message = f"{KIND_TITLE[kind]} {shown(name)} is claimed by {claimants}"
    return Finding("QR154", message, hint="uninstall all but one of them")


def _title(claim: Claim) -> str:
    return f"{KIND_TITLE[claim.kind]} {shown(claim.name)}"


def _subject(claim: Claim) -> str:
    return f"{_title(claim)} of {claim}"


def _raised_at(error: BaseException) -> tuple[str, ...]:
    """The line that failed, unless the message already names it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, SyntaxError):
        return ()
    return (f"raised at {frames[-1].filename}:{frames[-1].lineno}",)
