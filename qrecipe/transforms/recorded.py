"""Repeats on another copy what transforms have done to a model, and undoes it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from qrecipe.errors.findings import ArtifactError, PlanError
from qrecipe.model.call import Inputs
from qrecipe.model.copies import whole_copy
from qrecipe.model.kept import TRANSFORMED, kept, kept_with
from qrecipe.planning.chains import has_chain
from qrecipe.planning.groups import has_group
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan
from qrecipe.recipe.recipe import Recipe
from qrecipe.transforms.channels import apply_exponents
from qrecipe.transforms.record import Transformation
from qrecipe.transforms.smooth import apply_groups


def as_recorded(model: nn.Module, recipe: Recipe, inputs: Inputs, plan: Plan) -> nn.Module:
    """A copy of a model that is scaled as the plan of a transformed one records it.

    What plugins did is not repeated: a plan only says where. Raises ``ArtifactError`` (QR420) if
    the model cannot be scaled like that.
    """
    model = untransformed(model, recipe, inputs)
    inventory = inventory_of(model, recipe, inputs)
    for chain in plan.chains:
        if not has_chain(inventory, chain):
            raise different(f"it has no chain {' > '.join(chain.sites)} of that width")
    for group in plan.groups:
        if not has_group(inventory, group):
            raise different(f"it has no group {', '.join(group.sites)} of that width")
    changed = whole_copy(model)
    apply_exponents(changed, inventory, plan.chains)
    apply_groups(changed, inventory.opened, plan.groups)
    return changed


def untransformed(model: nn.Module, recipe: Recipe, inputs: Inputs) -> nn.Module:
    """A copy of a transformed model as it was before, to the bit; any other model itself.

    Raises ``PlanError`` (QR342) if a plugin has transformed it.
    """
    done = kept(model, TRANSFORMED)
    if not isinstance(done, Transformation):
        return model
    if done.steps:
        names = ", ".join(step.name for step in done.steps)
        message = f"the model was already transformed by {names}, which cannot be undone"
        raise PlanError.of("QR342", message, hint="pass the model as it was before")
    before = whole_copy(model)
    del kept_with(before)[TRANSFORMED]
    inventory = inventory_of(before, recipe, inputs)
    if not all(has_chain(inventory, chain) for chain in done.chains) or not all(
        has_group(inventory, group) for group in done.groups
    ):
        return before  # it has been changed since
    apply_groups(before, inventory.opened, done.groups, undo=True)
    undone = [
        replace(chain, exponents=tuple(tuple(-e for e in each) for each in chain.exponents))
        for chain in done.chains
    ]
    apply_exponents(before, inventory, undone)
    return before


def different(what: str) -> ArtifactError:
    """The error about a reference that the converted model was not made from."""
    return ArtifactError.of(
        "QR420",
        f"the converted model was not made from a model like this reference: {what}",
        hint="pass the float model that was quantized",
    )
