"""`qrecipe.transform`: the float model after the steps of ``[transform]``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qrecipe.errors.findings import AuditError, CalibrationError
from qrecipe.execution.batches import Forward, inputs_of_batch, rereadable
from qrecipe.execution.calls import Feed
from qrecipe.execution.shards import check_same, first_of_all
from qrecipe.model.copies import whole_copy
from qrecipe.model.kept import TRANSFORMED, kept
from qrecipe.observers.registration import created
from qrecipe.planning.decide import make_plan
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Step
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.registry.builtin import TRANSFORMS
from qrecipe.terminal.progress import Progress
from qrecipe.transforms.base import Scaled, Transform, TransformContext
from qrecipe.transforms.contract import applied
from qrecipe.transforms.proof import Results, difference, moved_sites, outputs_of, results_of
from qrecipe.transforms.record import Transformation, attach
from qrecipe.transforms.recorded import untransformed


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

    It computes the same as the model: its outputs for the first batch are compared, to the bit
    unless a plugin declares a tolerance.
    `qrecipe.transformation` says what was done. `qrecipe.quantize` and whatever else takes a recipe
    transform the model themselves, or use it as it is if it was transformed by the same settings.

    ``batches`` and ``forward`` are as in `qrecipe.calibrate`, also in a process group. A model is
    returned as it is, copied, if the recipe has no transforms. A model that was transformed before
    is taken back first.

    Raises:
        RecipeError, PlanError, CalibrationError: as `qrecipe.quantize`.
        AuditError: the outputs differ (QR417).
        ExecutionError: the transform of a plugin fails (QR418).
    """
    loaded = replace(load_recipe(recipe), phase="ptq")
    check_same("transform", loaded.fingerprint, model)
    share = ranks.share(loaded.calibration.max_batches)
    held = rereadable(batches, share)
    first, _ = first_of_all(held)
    with inputs_of_batch(model, first, forward) as inputs:
        model = untransformed(model, loaded, inputs)
        inventory = inventory_of(model, loaded, inputs)
        plan = make_plan(inventory, loaded)
    context = TransformContext(plan, inventory, Feed(held, forward, share, progress))
    inside = partial(results_of, recipe=loaded, inputs=inputs, batch=first, forward=forward)
    changed = whole_copy(model)
    done, outputs = Transformation(loaded.transform), outputs_of(model, first, forward)
    for name, step in _steps(loaded):
        before = outputs
        done = _applied(done, name, step, changed, context, inside)
        outputs = outputs_of(changed, first, forward)
        _check(name, difference(before, outputs, step.tolerance))
    attach(changed, done)
    return changed


def _steps(recipe: Recipe) -> Iterator[tuple[str, Transform]]:
    """The transforms of a recipe in their order: those of plugins first, by their names.

    They see the model as its author wrote it; ours then scale what is left.
    """
    for name, plugin in recipe.transform.plugins.items():
        yield name, created("transform", name, plugin.arguments)
    for name in TRANSFORMS:
        table = getattr(recipe.transform, name)
        if table is not None:
            yield name, created("transform", name, dict(table))


def _applied(
    done: Transformation,
    name: str,
    step: Transform,
    model: nn.Module,
    context: TransformContext,
    inside: Callable[[nn.Module], Results],
) -> Transformation:
    """Apply a transform to a model in place, and complete the record.

    ``inside`` gives what a model's sites give.
    """
    if name in TRANSFORMS:
        scaled = step.apply(model, context)
        assert isinstance(scaled, Scaled)
        return replace(
            done,
            chains=done.chains + scaled.chains,
            groups=done.groups + scaled.groups,
            spreads=done.spreads + scaled.spreads,
        )
    before = inside(model)
    changed, problem = applied(step, model, context)
    _check(name, problem)
    check_same(f"transform {name}", name, model)
    moved = moved_sites(before, inside(model), step.tolerance)
    made = Step(name, step.tolerance, changed, moved)
    return replace(done, steps=(*done.steps, made))


def _check(name: str, problem: str | None) -> None:
    """Raises ``AuditError`` (QR417) if a transform has not kept what the model computes."""
    if problem is None:
        return
    own = "list its chains or groups without the layer that is to blame, and report the model"
    raise AuditError.of(
        "QR417",
        f"[transform.{name}] changes what the float model computes: {problem}",
        hint=own if name in TRANSFORMS else "remove it, or report it to the author of the plugin",
    )


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
