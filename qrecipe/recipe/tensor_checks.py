"""Checks of tensor specs, alone and for what they are used for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qrecipe.errors.findings import Finding
from qrecipe.errors.text import shown
from qrecipe.recipe.extends import Composition
from qrecipe.recipe.layers import SettingPath
from qrecipe.recipe.pairing import contradictions, is_per_channel, is_static_integer, missing_keys
from qrecipe.recipe.schema import Constructor, TensorSpec
from qrecipe.recipe.schema_errors import dotted
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.registry.builtin import Kind, check_arguments


def tensor_findings(recipe: Composition, name: str, spec: TensorSpec) -> Iterator[Finding]:
    """The problems of ``[tensor.NAME]``, whatever it is used for."""
    path = ("tensor", name)
    yield from _constructor_findings(recipe, "observer", path, spec.observer)
    yield from _constructor_findings(recipe, "fake_quant", path, spec.fake_quant)
    if not recipe.is_sound(*path, "is_dynamic"):  # the rest depends on it
        return
    yield from _missing_findings(recipe, path, spec)
    for problem in contradictions(spec):
        about = recipe.about_key if problem.is_surplus else recipe.about_value
        finding = about("QR109", problem.message, (*path, *problem.at), problem.hint)
        yield _related(recipe, finding, (*path, *problem.cause)) if problem.cause else finding


def weight_findings(
    recipe: Composition, use: KeyPath, name: str, spec: TensorSpec
) -> Iterator[Finding]:
    """Why a tensor spec cannot be a weight; ``use`` is the path that names it."""
    if spec.reduce_range and is_static_integer(spec):
        yield _misuse(
            recipe,
            use,
            f"{shown(name)} has reduce_range, which is for activations only",
            ("tensor", name, "reduce_range"),
            "use a tensor without reduce_range",
        )
    if spec.is_dynamic and spec.dtype in ("int8", "uint8"):
        yield _misuse(
            recipe,
            use,
            f"{shown(name)} is dynamic, which a weight cannot be",
            ("tensor", name, "is_dynamic"),
            "only activations have ranges that change at run time",
        )


def activation_findings(
    recipe: Composition, use: KeyPath, name: str, spec: TensorSpec
) -> Iterator[Finding]:
    """Why a tensor spec cannot be an activation; ``use`` is the path that names it."""
    if is_static_integer(spec) and is_per_channel(spec):
        yield _misuse(
            recipe,
            use,
            f"{shown(name)} is per channel, which no kernel supports for activations",
            ("tensor", name, "observer" if spec.qscheme is None else "qscheme"),
            "use a per-tensor observer and qscheme",
        )


def _misuse(recipe: Composition, use: KeyPath, message: str, cause: KeyPath, hint: str) -> Finding:
    finding = recipe.about_value("QR109", message, use, hint)
    return _related(recipe, finding, cause)


def _related(recipe: Composition, finding: Finding, cause: KeyPath) -> Finding:
    return replace(finding, related=(("set at", recipe.owner(cause).key(cause)),))


def _missing_findings(
    recipe: Composition, path: SettingPath, spec: TensorSpec
) -> Iterator[Finding]:
    for missing in missing_keys(spec):
        if not recipe.is_sound(*path, missing.key):
            continue
        if missing.beside is None:
            at, message = path, f'{dotted(path)} needs "{missing.key}"'
        else:
            at = (*path, missing.beside)
            message = f'"{missing.beside}" needs "{missing.key}" as well'
        yield recipe.about_key("QR103", message, at, missing.hint)


def _constructor_findings(
    recipe: Composition, kind: Kind, path: SettingPath, constructor: Constructor | None
) -> Iterator[Finding]:
    if constructor is None:
        return
    for problem in check_arguments(kind, constructor.name, constructor.arguments):
        at = (*path, kind, "name" if problem.argument is None else problem.argument)
        if recipe.is_sound(*at):
            about = recipe.about_key if problem.code == "QR105" else recipe.about_value
            yield about(problem.code, problem.message, at, problem.hint)
