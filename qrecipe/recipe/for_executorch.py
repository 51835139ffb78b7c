"""A recipe for other kernels as ExecuTorch takes it, whose integers all have a sign."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qrecipe.recipe.overlay import overlay_recipe
from qrecipe.recipe.recipe import Recipe

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
