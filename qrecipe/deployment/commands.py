"""The commands that write the files that were measured."""

from __future__ import annotations

from collections.abc import Mapping

from qrecipe.deployment.ways import WAYS
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.recipe import Recipe


def commands(arguments: str, recipe: Recipe, *, is_for_vnni: bool) -> Mapping[str, str]:
    """By title; ``arguments`` are the recipe, the model and the data, as a shell takes them.

    None for a recipe that trains, since commands do not.
    """
    found = {}
    for way in WAYS if recipe.phase == "ptq" else ():
        if way.command is None:
            continue
        given = arguments
        if recipe.executor in way.instead_of:
            given += f" --executor {way.executor}"
        if is_for_vnni and way.runtime != "torch":
            given += " --target-cpu vnni"
        found[way.title] = f"qrecipe {way.command.format(given)}"
    return FrozenMapping(found)
