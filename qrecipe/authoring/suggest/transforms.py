"""Which transforms a model calls for, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import nn

from qrecipe.authoring.suggest.subject import Remedy
from qrecipe.errors.findings import QRecipeError
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.chains import chains_of
from qrecipe.planning.plan import Plan
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.overlay import overlay_recipe
from qrecipe.recipe.recipe import Recipe
from qrecipe.transforms.record import Spread, transformation
from qrecipe.transforms.transform import transform

_UNEVEN = 10.0
"""The widest channel over the median one, from where it is worth a step.

A network that lost nothing had 8 for its example input, and one that lost 5 dB had 13.
"""


def remedies(
    model: nn.Module, inputs: Inputs, inventory: Inventory, recipe: Recipe, plan: Plan
) -> Iterator[Remedy]:
    """The transforms that would even out what a recipe makes int8.

    Judged by what the channels give for the example inputs, as nothing else is there.
    """
    static = {site.name for site in plan.sites if site.mode == "static"}
    if static.isdisjoint(name for chain in chains_of(inventory) for name in chain.sites):
        return
    with unwarned(), suppress(QRecipeError):
        settings = {"by": "activations"}
        changed = overlay_recipe(recipe, {"transform": {"equalize": settings}})
        done = transformation(transform(model, changed, [inputs.batch], progress=False))
        uneven = [s for s in done.spreads if s.before >= _UNEVEN and s.site in static]
        if uneven:
            yield Remedy("equalize", settings, _reason(uneven))


def _reason(uneven: Sequence[Spread]) -> str:
    most = max(uneven, key=lambda each: each.before)
    others = f" ({len(uneven) - 1} more like it)" if len(uneven) > 1 else ""
    return (
        f"With the example inputs, the widest channel of {most.site} is {most.before:.2g} times as "
        f"wide as the median one{others}. [transform.equalize] evens channels out and changes no "
        "float result; only your data can show what it gains."
    )
