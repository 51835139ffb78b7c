"""The executor that somebody asked for: in the recipe, or for one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from qrecipe.errors.findings import Finding, UnsupportedError
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import shown, shown_names
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import Executor
from qrecipe.rules.structure import Mode

ASKED = "it is asked for"
"""Why an executor carries a plan out, if the recipe or the caller names it."""


MODES: Mapping[Executor, frozenset[Mode]] = {
    "fx": frozenset(get_args(Mode)),
    "eager": frozenset({"dynamic", "weight_only"}),
    "pt2e": frozenset(get_args(Mode)),
}
"""The modes of quantization that each executor has."""

DEQUANTIZE: frozenset[Executor] = frozenset({"pt2e"})
"""The executors with operators for integers and float kernels, not kernels of a backend."""

TRAIN: frozenset[Executor] = frozenset({"fx", "pt2e"})
"""The executors that prepare for training."""

PACK: frozenset[Executor] = frozenset({"fx", "eager"})
"""The executors that pack weights for an engine."""


def executed_by(recipe: Recipe, executor: Executor | None) -> Recipe:
    """The recipe for this executor, whatever it says itself; None leaves that to the recipe.

    Raises:
        UnsupportedError: there is no executor of that name (QR317).
    """
    if executor is None:
        return recipe
    if executor not in get_args(Executor):
        names = shown_names(get_args(Executor))
        message = f"executor is {shown(executor)}, but must be one of {names}"
        hint = did_you_mean(str(executor), get_args(Executor))
        raise UnsupportedError(Finding("QR317", message, hint=hint))
    return replace(recipe, executor=executor)
