"""What the transforms of a recipe change in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qrecipe.errors.findings import Finding
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.kept import TRANSFORMED, kept
from qrecipe.observers.registration import created
from qrecipe.planning.chains import chosen_chains
from qrecipe.planning.groups import chosen_groups
from qrecipe.planning.plan import Chain, Group, Site, Step
from qrecipe.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Changes:
    """What is scaled, and what is wrong with the recipe's transforms (QR340, QR341, QR222)."""

    chains: tuple[Chain, ...]
    groups: tuple[Group, ...]
    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]


def chosen_changes(inventory: Inventory, sites: Sequence[Site], recipe: Recipe) -> Changes:
    """What the recipe scales, or what was scaled in a model that is quantized as it is.

    That is one that was transformed by these settings, or before a recipe without any.
    """
    done = kept(inventory.model, TRANSFORMED)
    if done is not None and not recipe.transform.changes:
        return Changes(done.chains, done.groups, done.steps, ())
    if done is not None and done.table == recipe.transform:
        # what is idle is still worth a warning
        _, idle_chains = ((), ()) if done.chains else chosen_chains(inventory, recipe)
        _, idle_groups = ((), ()) if done.groups else chosen_groups(inventory, sites, recipe)
        return Changes(done.chains, done.groups, done.steps, (*idle_chains, *idle_groups))
    chains, about_chains = chosen_chains(inventory, recipe)
    groups, about_groups = chosen_groups(inventory, sites, recipe)
    steps = tuple(
        Step(name, created("transform", name, table.arguments).tolerance)
        for name, table in recipe.transform.plugins.items()
    )
    return Changes(chains, groups, steps, (*about_chains, *about_groups))
