"""A model whose sites are to be ranked: planned, and its sites isolated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from qrecipe.errors.findings import ExecutionError
from qrecipe.execution.batches import Forward, inputs_of_batch, peek
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.executors import executor_of
from qrecipe.execution.isolated import Isolated
from qrecipe.execution.part import Task
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.decide import plan_of
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.target_cpu import TargetCpu, unjudged_sites
from qrecipe.recipe.recipe import Recipe
from qrecipe.terminal.progress import Progress


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and its plan; ``reasons`` say why each site that is not in ``sites`` is left out."""

    model: nn.Module
    plan: Plan
    sites: Sequence[Site]
    reasons: Mapping[str, str]
    _task: Task

    def isolated(
        self, batches: Iterable[Any], forward: Forward | None, progress: Progress | bool | None
    ) -> Isolated:
        """The model with its sites in place, calibrated on the batches."""
        run = partial(calibrate, batches=batches, forward=forward, progress=progress)
        return executor_of(self.plan.executor).isolated(self._task, self.sites, run)


def subject_of(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    forward: Forward | None,
    target_cpu: TargetCpu,
) -> Subject:
    """Plan the recipe for the first batch. Raises ``ExecutionError`` (QR422) without any site."""
    first, _ = peek(batches)
    with inputs_of_batch(model, first, forward) as inputs:
        inventory = inventory_of(model, recipe, inputs)
    plan = plan_of(inventory, recipe, inputs)
    reasons = unranked(inventory, plan)
    sites = [site for site in plan.sites if site.name not in reasons]
    if not sites:
        raise ExecutionError.of(
            "QR422",
            f"the plan quantizes none of {len(reasons)} sites with a range of its own",
            hint="`qrecipe plan` shows why each stays float",
        )
    unjudged = unjudged_sites(plan, target_cpu)
    task = Task(inventory.model, recipe, inventory, plan, inputs, unjudged)
    return Subject(model, plan, sites, reasons, task)


def unranked(inventory: Inventory, plan: Plan) -> dict[str, str]:
    """The sites that cannot be quantized alone, and why."""
    found: dict[str, str] = {}
    for site in plan.sites:
        if site.verdict == "float":
            found[site.name] = "stays float"
        elif site.verdict == "passthrough":
            found[site.name] = f"{site.reason}: alone it would stay float"
        elif inventory.matches[site.name].operation.kind == "fixed_qparams":
            found[site.name] = "its range is fixed and its producer float: alone it stays float"
    return found
