"""`qrecipe.transform`: the float model after the steps of ``[transform]``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.errors.findings import ArtifactError, AuditError, CalibrationError
from qrecipe.execution.batches import (
    Forward,
    check_finite,
    inputs_of_batch,
    known_length,
    limited,
    rereadable,
)
from qrecipe.execution.calls import calls_of, run_quietly
from qrecipe.execution.shards import check_same, first_of_all
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, whole_copy
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.kept import TRANSFORMED, kept, kept_with
from qrecipe.model.nested import tensors_in
from qrecipe.model.opened.opening import opened_at
from qrecipe.planning.chains import has_chain
from qrecipe.planning.changeable import Layer
from qrecipe.planning.decide import make_plan
from qrecipe.planning.groups import has_group
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Chain, Group, Plan
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress, tracked
from qrecipe.transforms.channels import Joint, Largest, apply_exponents, joints_of, layers_of
from qrecipe.transforms.equalize import equalize_by_activations, equalize_by_weights
from qrecipe.transforms.record import Spread, Transformation, attach
from qrecipe.transforms.smooth import apply_groups, of_all_ranks, smoothed, watching


@neutral
@ranks.together
def transform(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """A copy of the float model after the steps of the recipe's ``[transform]`` table.

    It computes the same as the model: its outputs for the first batch are compared to the bit.
    `qrecipe.transformation` says what was done. `qrecipe.quantize` and whatever else takes a recipe
    transform the model themselves, or use it as it is if it was transformed by the same settings.

    ``batches`` and ``forward`` are as in `qrecipe.calibrate`, also in a process group. A model is
    returned as it is, copied, if the recipe has no transforms. A model that was transformed before
    is taken back first.

    Raises:
        RecipeError, PlanError, CalibrationError: as `qrecipe.quantize`.
        AuditError: the outputs differ (QR417).
    """
    loaded = replace(load_recipe(recipe), phase="ptq")
    check_same("transform", loaded.fingerprint, model)
    held = rereadable(batches, ranks.share(loaded.calibration.max_batches))
    first, _ = first_of_all(held)
    with inputs_of_batch(model, first, forward) as inputs:
        model = _untransformed(model, loaded, inputs)
        inventory = inventory_of(model, loaded, inputs)
        plan = make_plan(inventory, loaded)
    data = _Data(held, ranks.share(loaded.calibration.max_batches), forward, progress)
    changed = whole_copy(model)
    chains, spreads = _equalize(changed, loaded, plan, inventory, data)
    groups, of_groups = _smooth(changed, loaded, plan, inventory, data)
    _prove(model, changed, first, forward)
    attach(changed, Transformation(loaded.transform, chains, groups, (*spreads, *of_groups)))
    return changed


def ready(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any] | None,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """The model that a recipe quantizes: transformed if the recipe says so, and it is not yet.

    Raises ``CalibrationError`` (QR408) if there are no batches to transform it with.
    """
    if not recipe.transform.changes or is_ready(model, recipe):
        return model
    if batches is None:
        hint = "pass batches=, or the model that qrecipe.transform(model, recipe, batches) returns"
        message = "the recipe transforms the model, which takes batches"
        raise CalibrationError.of("QR408", message, hint=hint)
    return transform(model, recipe, batches, forward=forward, progress=progress)


def is_ready(model: nn.Module, recipe: Recipe) -> bool:
    """Whether a model was transformed by these settings."""
    done = kept(model, TRANSFORMED)
    return isinstance(done, Transformation) and done.table == recipe.transform


def as_recorded(model: nn.Module, recipe: Recipe, inputs: Inputs, plan: Plan) -> nn.Module:
    """A copy of a model that is scaled as the plan of a transformed one records it.

    Raises ``ArtifactError`` (QR420) if the model cannot be scaled like that.
    """
    model = _untransformed(model, recipe, inputs)
    inventory = inventory_of(model, recipe, inputs)
    for chain in plan.chains:
        if not has_chain(inventory, chain):
            raise different(f"it has no chain {' > '.join(chain.sites)} of that width")
    for group in plan.groups:
        if not has_group(inventory, group):
            raise different(f"it has no group {', '.join(group.sites)} of that width")
    changed = whole_copy(model)
    apply_exponents(changed, plan.chains, layers_of(inventory, plan.chains))
    apply_groups(changed, inventory.opened, plan.groups)
    return changed


def _untransformed(model: nn.Module, recipe: Recipe, inputs: Inputs) -> nn.Module:
    """A copy of a transformed model as it was before, to the bit; any other model itself."""
    done = kept(model, TRANSFORMED)
    if not isinstance(done, Transformation):
        return model
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
    apply_exponents(before, undone, layers_of(inventory, done.chains))
    return before


def different(what: str) -> ArtifactError:
    return ArtifactError.of(
        "QR420",
        f"the converted model was not made from a model like this reference: {what}",
        hint="pass the float model that was quantized",
    )


@dataclass(frozen=True, slots=True)
class _Data:
    """The batches that a transform may look at."""

    batches: Iterable[Any]
    limit: int
    forward: Forward | None
    progress: Progress | bool | None

    def run(self, probe: nn.Module) -> None:
        """Run one of our models on them."""
        show = chosen_progress(self.progress, "transforming")
        total = known_length(self.batches, self.limit)
        for index, batch in tracked(limited(self.batches, self.limit), show, total):
            check_finite(batch, index)
            run_quietly(probe, batch, index, self.forward)


def _equalize(
    changed: nn.Module, recipe: Recipe, plan: Plan, inventory: Inventory, data: _Data
) -> tuple[tuple[Chain, ...], Iterable[Spread]]:
    """Equalize a model in place; returns the chains with their exponents."""
    if not plan.chains:
        return (), ()
    layers = layers_of(inventory, plan.chains)
    joints = [joint for chain in plan.chains for joint in joints_of(chain, layers)]
    before, probe = Largest(), runnable_copy(changed)
    with before.watching(probe, joints):
        data.run(probe)
    before = before.of_all_ranks()
    exponents = _equalized(changed, recipe, plan.chains, layers, before)
    after = {
        joint: None if (seen := before.of(joint)) is None else seen / exponents[joint].exp2()
        for joint in joints
    }
    spreads = (
        Spread(joint.site, joint.reader, _spread(before.of(joint)), _spread(after[joint]))
        for joint in joints
    )
    return tuple(_with_exponents(chain, layers, exponents) for chain in plan.chains), spreads


def _smooth(
    changed: nn.Module, recipe: Recipe, plan: Plan, inventory: Inventory, data: _Data
) -> tuple[tuple[Group, ...], Iterable[Spread]]:
    """Smooth a model in place; returns the groups with their exponents."""
    table = recipe.transform.smooth
    wanted = [group for group in plan.groups if group.place != "none"]
    if table is None or not wanted:
        return plan.groups, ()
    opened = opened_at(changed, inventory.opened)
    probe = runnable_copy(opened)
    with watching(probe, wanted) as seen:
        data.run(probe)
    seen = of_all_ranks(seen)
    made = {
        group: smoothed(opened, group, seen[group], table.alpha, [plan[n] for n in group.sites])
        for group in wanted
    }
    apply_groups(changed, inventory.opened, list(made.values()))
    spreads = (
        Spread(
            group.at or "a product",
            ", ".join(group.sites),
            _spread(largest),
            _spread(largest / torch.tensor(made[group].exponents).exp2()),
        )
        for group, read in seen.items()
        if (largest := read.largest) is not None
    )
    return tuple(made.get(group, group) for group in plan.groups), spreads


def _equalized(
    changed: nn.Module,
    recipe: Recipe,
    chains: Sequence[Chain],
    layers: Mapping[str, Layer],
    largest: Largest,
) -> dict[Joint, Tensor]:
    table = recipe.transform.equalize
    if table is not None and table.by == "weights":
        return equalize_by_weights(changed, chains, layers)
    return equalize_by_activations(changed, chains, layers, largest)


def _with_exponents(
    chain: Chain, layers: Mapping[str, Layer], exponents: Mapping[Joint, Tensor]
) -> Chain:
    found = (exponents[joint] for joint in joints_of(chain, layers))
    return replace(chain, exponents=tuple(tuple(map(int, each.tolist())) for each in found))


def _spread(largest: Tensor | None) -> float:
    used = largest[largest > 0] if largest is not None else torch.zeros(0)
    return float(used.max() / used.median()) if used.numel() else 1.0


def _prove(model: nn.Module, changed: nn.Module, first: Any, forward: Forward | None) -> None:
    """Raises ``AuditError`` (QR417) if a model gives other outputs for a batch."""
    outputs = []
    for each in (model, changed):
        calls = calls_of(runnable_copy(each), first, 0, forward)
        outputs.append([tensor for call in calls for tensor in tensors_in(call.output)])
    before, after = outputs
    if len(before) == len(after) and all(map(_equal, before, after)):
        return
    raise AuditError.of(
        "QR417",
        "the transformed model computes something else than the float model",
        hint="chains = [...] without the layer that is to blame, and report the model",
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal to the bit; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
