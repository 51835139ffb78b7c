"""A recipe that extends another one and sets little: which sites stay float, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import tomli

from qrecipe.errors.findings import RecipeError, RecipeReferenceError, RecipeSyntaxError
from qrecipe.errors.text import shown
from qrecipe.files import check_replaceable_file, failing_for, write_atomically
from qrecipe.recipe.layers import flattened, nested, unreasoned
from qrecipe.recipe.patterns import literal
from qrecipe.recipe.recipe import Recipe, load_recipe, parse_recipe
from qrecipe.recipe.references import is_reference
from qrecipe.recipe.schema import FLOAT
from qrecipe.recipe.toml.writer import toml_text

_SUFFIX = "-overlay.toml"


def rule_key(name: str, members: Collection[str]) -> str:
    """The key of a rule for this site only; ``members`` are all calls of the model."""
    return literal(f"{name}#0" if f"{name}#1" in members else name)


def float_rule(reason: str) -> dict[str, str]:
    """The rule that leaves something float."""
    return {"qconfig": FLOAT, "reason": reason}


def float_rules(reasons: Mapping[str, str]) -> dict[str, Any]:
    """Rules that leave sites float: ``reasons`` by rule key, the worst site first."""
    rules = {key: float_rule(reason) for key, reason in reasons.items()}
    return {"rules": {"module_name": rules}}


def overlay_values(reasons: Mapping[str, str], members: Collection[str]) -> dict[str, Any]:
    """The rules of an overlay that leaves sites float; ``members`` are all calls of the model."""
    rules = {rule_key(name, members): reason for name, reason in reasons.items()}
    return float_rules(rules) if rules else {}


def merged_rules(rules: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The rules of a recipe by tier plus new ones, as tables.

    The new rules come last, in their own order, even if they replace others.
    """
    own = dict(flattened({"rules": new}))
    old = {path: rule for path, rule in flattened({"rules": rules}) if path not in own}
    return nested((path[1:], _table(rule)) for path, rule in {**old, **own}.items())


def overlay_recipe(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with additional values: whole rules, keys of tensors, a description.

    It extends the recipe if that has a reference or a file; otherwise it includes its values.
    """
    write, path = partial(_inlined, recipe), None
    if recipe.reference is not None and is_reference(recipe.reference):
        write = partial(_extending, recipe.reference)
    elif recipe.path is not None:
        base = Path(recipe.path)
        write, path = partial(_extending, f"./{base.name}"), base.with_name(f"{base.stem}{_SUFFIX}")
    return fitting(write, values, path)[1]


def fitting(
    write: Callable[[Mapping[str, Any]], str], values: Mapping[str, Any], path: Path | None = None
) -> tuple[str, Recipe]:
    """The text that ``write`` makes of the values, and its recipe, within the size limits.

    Reasons are dropped if the recipe would be too large with them. Raises ``RecipeError`` if that
    is not enough.
    """
    text = write(values)
    try:
        return text, parse_recipe(text, path)
    except RecipeSyntaxError as error:
        if [finding.code for finding in error.findings] != ["QR002"]:
            raise
    text = write(_without_reasons(values))
    return text, parse_recipe(text, path)


def _without_reasons(values: Mapping[str, Any]) -> dict[str, Any]:
    return nested(
        (path, unreasoned(_table(value)) if path[0] == "rules" else value)
        for path, value in flattened(values)
    )


def save_overlay(recipe: Recipe, values: Mapping[str, Any], path: Path) -> None:
    """Write the overlay to a file, extending what can be reached from there.

    Raises ``RecipeReferenceError`` (QR001) if it cannot be written or would replace something that
    is not a recipe.
    """
    check_replaceable(path)
    base, text = _base_seen_from(recipe, path), None
    # never write what could not be read back
    if base is not None:
        with suppress(RecipeReferenceError):  # outside the tree of the new file
            text, _ = fitting(partial(_extending, base), values, path)
    if text is None:
        text, _ = fitting(partial(_inlined, recipe), values, path)
    write_atomically(path, text)


def make_directory(path: Path) -> None:
    """Make a directory for recipes, unless it is there.

    Raises ``RecipeReferenceError`` (QR001) if that fails, or if it has something in it.
    """
    with failing_for(RecipeReferenceError, "QR001", f"cannot write to {shown(str(path))}"):
        path.mkdir(exist_ok=True)
        taken = any(path.iterdir())
    if taken:
        message = f"{shown(str(path))} is not empty"
        hint = "name a new directory, or remove what is in this one"
        raise RecipeReferenceError.of("QR001", message, hint=hint)


def check_replaceable(path: Path) -> None:
    """Raises ``RecipeReferenceError`` (QR001) if no recipe can be written there.

    A file that is not a recipe is not replaced.
    """
    with failing_for(RecipeReferenceError, "QR001", f"cannot write {shown(str(path))}"):
        check_replaceable_file(path)
    if not os.path.exists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return
    try:
        load_recipe(path)
    except RecipeError as error:
        message = f"{shown(str(path))} exists and is not a recipe: {error.findings[0].message}"
        hint = "name another file, or remove this one"
        raise RecipeReferenceError.of("QR001", message, hint=hint) from None


def _base_seen_from(recipe: Recipe, path: Path) -> str | None:
    if recipe.reference is not None and is_reference(recipe.reference):
        return recipe.reference
    if recipe.path is None:
        return None
    base, folder = Path(recipe.path).resolve(), path.resolve().parent
    if base == path.resolve():
        return None  # it would replace its own base
    relative = Path(os.path.relpath(base, folder)).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def _extending(base: str, values: Mapping[str, Any]) -> str:
    return toml_text({"format": 1, "extends": base, **values})


def _inlined(recipe: Recipe, values: Mapping[str, Any]) -> str:
    resolved: dict[str, Any] = tomli.loads(recipe.to_toml())
    tensors = dict(resolved.get("tensor", {}))
    for name, keys in values.get("tensor", {}).items():
        tensors[name] = {**tensors[name], **keys}
    rules = merged_rules(resolved["rules"], values.get("rules", {}))
    return toml_text({**resolved, **values, "tensor": tensors, "rules": rules})


def _table(rule: Any) -> Any:
    """A rule as a table, also if it is only the name of a qconfig."""
    return {"qconfig": rule} if isinstance(rule, str) else rule


_EPS = 2.0**-12
"""The least scale that XNNPACK has."""


def for_executorch(recipe: Recipe) -> Recipe:
    """The same rules for ``backend = "executorch"``, with activations in int8.

    Weights leave out -128, and no range is halved: XNNPACK adds in 32 bits on every CPU.
    """
    if recipe.backend == "executorch":
        return recipe
    values = {"backend": "executorch", "executor": "pt2e", "tensor": dict(_tensors(recipe))}
    return overlay_recipe(recipe, values)


def _tensors(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    weights = [qconfig.weight for qconfig in recipe.qconfigs.values()]
    for name, spec in recipe.tensors.items():
        if spec in weights and spec.dtype == "int8":
            yield name, {"quant_min": -127, "quant_max": 127, "eps": _EPS}
        elif spec not in weights and spec.dtype == "uint8" and not spec.is_dynamic:
            yield name, {"dtype": "int8", "reduce_range": False, "eps": _EPS}
