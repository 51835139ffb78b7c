"""A recipe of a few rules that extends another: which sites stay float, and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli

from qrecipe.errors import RecipeReferenceError
from qrecipe.recipe import Recipe, load_recipe, parse_recipe
from qrecipe.references import is_reference
from qrecipe.schema import FLOAT
from qrecipe.writing import toml_text, write_atomically

_SUFFIX = "-overlay.toml"


def overlay_recipe(recipe: Recipe, reasons: Mapping[str, str]) -> Recipe:
    """The recipe with a rule that leaves each named site float.

    ``reasons`` has the keys of the rules, the worst site first. It extends a recipe that has a
    reference or a file, and has the values of any other in itself.
    """
    if recipe.reference is not None and is_reference(recipe.reference):
        return parse_recipe(_extending(recipe.reference, reasons))
    if recipe.path is not None:
        base = Path(recipe.path)
        beside = base.with_name(f"{base.stem}{_SUFFIX}")
        return parse_recipe(_extending(f"./{base.name}", reasons), beside)
    return parse_recipe(_inlined(recipe, reasons))


def save_overlay(recipe: Recipe, reasons: Mapping[str, str], path: Path) -> Recipe:
    """Write the same to a file, extending what can be reached from there, and load it.

    Raises ``RecipeReferenceError`` (QR001) where it cannot be written.
    """
    text = _inlined(recipe, reasons)
    base = _base_seen_from(recipe, path)
    if base is not None:
        extending = _extending(base, reasons)
        try:
            parse_recipe(extending, path)
            text = extending
        except RecipeReferenceError:
            pass  # out of the tree of the new file, which must hold everything itself
    parse_recipe(text, path)  # nothing is written that could not be read
    write_atomically(path, text)
    return load_recipe(path)


def _base_seen_from(recipe: Recipe, path: Path) -> str | None:
    if recipe.reference is not None and is_reference(recipe.reference):
        return recipe.reference
    if recipe.path is None:
        return None
    base, folder = Path(recipe.path).resolve(), path.resolve().parent
    if base == path.resolve():
        return None  # it takes the place of its own base
    relative = Path(os.path.relpath(base, folder)).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def _extending(base: str, reasons: Mapping[str, str]) -> str:
    return toml_text({"format": 1, "extends": base, "rules": {"module_name": _rules(reasons)}})


def _inlined(recipe: Recipe, reasons: Mapping[str, str]) -> str:
    values: dict[str, Any] = tomli.loads(recipe.to_toml())
    rules = {
        tier: _table(rule) if tier == "global" else {k: _table(r) for k, r in rule.items()}
        for tier, rule in values["rules"].items()
    }
    # the new rules last, in their own order, also where they take the place of another
    old = {k: v for k, v in rules.get("module_name", {}).items() if k not in reasons}
    return toml_text({**values, "rules": {**rules, "module_name": {**old, **_rules(reasons)}}})


def _table(rule: Any) -> Any:
    """A rule that is the name of a qconfig alone, as a table."""
    return {"qconfig": rule} if isinstance(rule, str) else rule


def _rules(reasons: Mapping[str, str]) -> dict[str, Any]:
    return {key: {"qconfig": FLOAT, "reason": reason} for key, reason in reasons.items()}
