"""The proof that a transform keeps what the float model computes, and what it moves inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.errors.warn import collected
from qrecipe.execution.batches import Forward
from qrecipe.execution.calls import calls_of, run_quietly
from qrecipe.execution.watched import Watched, watched_modules
from qrecipe.model.call import Inputs
from qrecipe.model.changes import without_changes_in_place
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.digest import tensors_digest
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.nested import tensors_in
from qrecipe.planning.inventory import inventory_of
from qrecipe.recipe.recipe import Recipe


def outputs_of(model: nn.Module, batch: Any, forward: Forward | None) -> list[Tensor]:
    """The tensors that a model gives for a batch."""
    calls = calls_of(runnable_copy(model), batch, 0, forward)
    return [tensor for call in calls for tensor in tensors_in(call.output)]


def difference(before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float) -> str | None:
    """How outputs differ by more than a tolerance, None if they don't.

    It is in parts of the largest number of a tensor. At 0, tensors are equal to the bit; NaN
    equals NaN.
    """
    if [each.shape for each in before] != [each.shape for each in after]:
        return "its outputs have other shapes"
    if all(map(_equal, before, after)):
        return None
    if not all(bool(each.isfinite().all()) for each in after if each.is_floating_point()):
        return "its outputs are no longer finite"
    farthest = max(map(_distance, before, after))
    if farthest <= tolerance:
        return None
    allowed = f"{tolerance:.2g}" if tolerance else "nothing"
    return f"outputs differ by {farthest:.2g} of the largest one, and it declares {allowed}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.to(torch.float64), b.to(torch.float64)
    largest = float(a.abs().amax()) if a.numel() else 0.0
    farthest = float((a - b).abs().amax()) if a.numel() else 0.0
    return farthest / largest if largest else float(farthest > 0)


Facts = Mapping[str, tuple[int, str, str]]
"""What stays and what may change of each tensor, by its name: the object, its form, its digest."""


def facts_of(model: nn.Module) -> Facts:
    """The facts about the tensors of a model."""
    return {
        name: (id(each), f"{tuple(each.shape)} {each.dtype}", tensors_digest([("", each)]))
        for name, each in _tensors(model).items()
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return dict(chain(*named))


def classes_of(model: nn.Module) -> dict[str, type[nn.Module]]:
    """The classes of all modules by their paths."""
    return {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}


def reached_too_far(
    before: Facts, after: Facts, classes: Sequence[Mapping[str, type[nn.Module]]]
) -> str | None:
    """What a transform changed besides the numbers in tensors, or None."""
    if classes[0] != classes[1]:
        return "it adds, removes or replaces modules"
    if before.keys() != after.keys():
        return "it adds or removes parameters or buffers"
    for name, (own, form, _) in before.items():
        if after[name][:2] != (own, form):
            return f"it replaces {name} instead of changing it in place"
    return None


def changed_modules(before: Facts, after: Facts) -> tuple[str, ...]:
    """The modules of the tensors that have other numbers now, in order."""
    names = [name for name in before if before[name][2] != after[name][2]]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


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
