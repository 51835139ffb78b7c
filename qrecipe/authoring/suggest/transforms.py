"""Which transforms a model calls for, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from qrecipe.authoring.suggest.delicate import NORMS
from qrecipe.authoring.suggest.schemes import Remedy
from qrecipe.errors.findings import QRecipeError
from qrecipe.model.call import Inputs
from qrecipe.planning.plan import Plan
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.overlay import overlay_recipe
from qrecipe.recipe.recipe import Recipe
from qrecipe.transforms.record import Spread, Transformation, transformation
from qrecipe.transforms.transform import transform

_UNEVEN = 10.0
"""The widest channel over the median one, from where it is worth a step.

A network that lost nothing had 8 for its example input, and one that lost 5 dB had 13.
"""

_TABLES: Mapping[str, Mapping[str, Any]] = {
    "equalize": {"by": "activations"},
    "smooth": {"alpha": [0.5, 0.7, 0.85]},
}


def remedies(model: nn.Module, inputs: Inputs, recipe: Recipe, plan: Plan) -> Iterator[Remedy]:
    """The transforms that would even out what a recipe makes int8.

    Judged by what the channels give for the example inputs, as nothing else is there.
    """
    with unwarned(), suppress(QRecipeError):
        changed = overlay_recipe(recipe, {"transform": _TABLES})
        done = transformation(transform(model, changed, [inputs.batch], progress=False))
        for name, spreads in (
            ("equalize", _of_chains(done, plan)),
            ("smooth", _of_norms(done, plan)),
        ):
            uneven = [each for each in spreads if each.before >= _UNEVEN]
            if uneven:
                yield Remedy(name, _TABLES[name], _reason(name, uneven))


def _of_chains(done: Transformation, plan: Plan) -> Iterator[Spread]:
    """The spreads between the static sites of chains."""
    sites = {name for chain in done.chains for name in chain.sites if plan[name].mode == "static"}
    return (each for each in done.spreads if each.site in sites and each.reader in sites)


def _of_norms(done: Transformation, plan: Plan) -> Iterator[Spread]:
    """The spreads of what groups read from a norm, if smoothing them is a gain."""
    operations = {operation.name: operation for operation in plan.structure.operations}
    for group in done.groups:
        read = operations[group.sites[0]].producers
        if group.alpha is not None and any(operations[name].op in NORMS for name in read):
            readers = ", ".join(group.sites)
            given = (each for each in done.spreads if each.reader == readers)
            yield from (Spread(read[0], readers, each.before, each.after) for each in given)


def _reason(name: str, uneven: Sequence[Spread]) -> str:
    most = max(uneven, key=lambda each: each.before)
    others = f" ({len(uneven) - 1} more like it)" if len(uneven) > 1 else ""
    return (
        f"With the example inputs, the widest channel of {most.site} is {most.before:.2g} times as "
        f"wide as the median one{others}. [transform.{name}] gives channels similar ranges and "
        "changes no float result, but needs calibration data, and only these show the gain."
    )
