"""Which results inside a model a transform moves, though it keeps those of the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from qrecipe.errors.warn import collected
from qrecipe.execution.batches import Forward
from qrecipe.execution.calls import run_quietly
from qrecipe.execution.watched import Watched, watched_modules
from qrecipe.model.call import Inputs
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.nested import tensors_in
from qrecipe.model.out_of_place import without_changes_in_place
from qrecipe.planning.inventory import inventory_of
from qrecipe.recipe.recipe import Recipe
from qrecipe.transforms.proof import difference

Results = Mapping[str, list[Tensor]]
"""What each site gives, in all of its calls."""


def results_of(
    model: nn.Module, recipe: Recipe, inputs: Inputs, batch: Any, forward: Forward | None
) -> Results:
    """What the sites of a float model give for a batch."""
    with collected():  # the plan gives these warnings
        inventory = inventory_of(model, recipe, inputs)
    found: dict[str, list[Tensor]] = {name: [] for name in inventory.matches}
    run_quietly(_watched(inventory, found), batch, 0, forward)
    return found


def _watched(inventory: Inventory, found: Mapping[str, list[Tensor]]) -> nn.Module:
    def see(name: str, result: Any, seconds: float) -> None:
        found[name].extend(tensors_in(result))

    if inventory.untraced is not None:
        return watched_modules(inventory.model, inventory.matches, see)
    last = {match.nodes[-1]: name for name, match in inventory.matches.items()}

    def see_node(node: fx.Node, result: Any, seconds: float) -> None:
        if node in last:
            see(last[node], result, seconds)

    for part in inventory.parts:
        without_changes_in_place(part.graph_module)
    graphs = {part.path: Watched(part.graph_module, see_node) for part in inventory.parts}
    return with_parts(inventory.model, graphs)


def moved_sites(before: Results, after: Results, tolerance: float) -> tuple[str, ...]:
    """The sites whose results differ by more than a tolerance, as in `difference`."""
    differs = partial(difference, tolerance=tolerance)
    return tuple(name for name in before if differs(before[name], after.get(name, [])))
