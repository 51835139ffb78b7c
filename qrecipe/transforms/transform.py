"""`qrecipe.transform`: the float model after the steps of ``[transform]``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.errors.findings import AuditError, CalibrationError
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
from qrecipe.model.copies import runnable_copy, whole_copy
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.kept import kept
from qrecipe.model.nested import tensors_in
from qrecipe.planning.chains import TRANSFORMED, Layer, has_chain
from qrecipe.planning.decide import make_plan
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Chain
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.terminal.progress import Progress, chosen_progress
from qrecipe.transforms.channels import Joint, Largest, apply_exponents, joints_of, layers_of
from qrecipe.transforms.equalize import equalize_by_activations, equalize_by_weights
from qrecipe.transforms.record import Spread, Transformation, attach


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
        inventory = inventory_of(model, loaded, inputs)
        chains = make_plan(inventory, loaded).chains
    model = untransformed(model, inventory)
    layers = layers_of(inventory, chains)
    changed = whole_copy(model)
    joints = [joint for chain in chains for joint in joints_of(chain, layers)]
    limit = ranks.share(loaded.calibration.max_batches)
    before = _largest(model, joints, held, limit, forward, progress)
    exponents = _equalized(changed, loaded, chains, layers, before)
    after = {
        joint: None if (seen := before.of(joint)) is None else seen / exponents[joint].exp2()
        for joint in joints
    }
    _prove(model, changed, first, forward)
    record = Transformation(
        loaded.transform,
        tuple(_with_exponents(chain, layers, exponents) for chain in chains),
        tuple(
            Spread(joint.site, joint.reader, _spread(before.of(joint)), _spread(after[joint]))
            for joint in joints
        ),
    )
    attach(changed, record)
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


def as_recorded(model: nn.Module, inventory: Inventory, chains: Sequence[Chain]) -> nn.Module:
    """A copy of a model whose channels are scaled as the chains of a transformed one record it."""
    changed = whole_copy(untransformed(model, inventory))
    apply_exponents(changed, chains, layers_of(inventory, chains))
    return changed


def untransformed(model: nn.Module, inventory: Inventory) -> nn.Module:
    """A copy of a transformed model as it was before, to the bit; any other model itself."""
    done = kept(model, TRANSFORMED)
    chains = done.chains if isinstance(done, Transformation) else ()
    if not chains or not all(has_chain(inventory, chain) for chain in chains):
        return model
    before = whole_copy(model)
    undone = [
        replace(chain, exponents=tuple(tuple(-e for e in each) for each in chain.exponents))
        for chain in chains
    ]
    apply_exponents(before, undone, layers_of(inventory, chains))
    return before


def _largest(
    model: nn.Module,
    joints: Sequence[Joint],
    batches: Iterable[Any],
    limit: int,
    forward: Forward | None,
    progress: Progress | bool | None,
) -> Largest:
    found, probe = Largest(), runnable_copy(model)
    show, total = chosen_progress(progress, "transforming"), known_length(batches, limit)
    with found.watching(probe, joints):
        for index, batch in enumerate(limited(batches, limit)):
            check_finite(batch, index)
            run_quietly(probe, batch, index, forward)
            show(index + 1, total)
    return found.of_all_ranks()


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
