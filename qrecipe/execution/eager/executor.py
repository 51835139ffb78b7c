"""Eager mode as an executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from qrecipe.execution.eager.isolated import isolated
from qrecipe.execution.eager.part import EagerPart
from qrecipe.execution.part import Compiled, Realised, Task
from qrecipe.model.architecture import check_same
from qrecipe.model.call import Inputs
from qrecipe.model.copies import without_weights
from qrecipe.model.record import Architecture
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import FxTable

__all__ = ["compile", "isolated", "realised_sites", "rebuilt", "traced_paths"]


def compile(task: Task) -> Compiled:
    """The model as a single part."""
    return Compiled((EagerPart(task.plan, task.model, task.inputs),))


def realised_sites(converted: fx.GraphModule) -> Mapping[str, Realised]:
    """None: sites are modules here."""
    return {}


def traced_paths(roots: Sequence[str]) -> tuple[str, ...]:
    """None."""
    return ()


def rebuilt(model: nn.Module, plan: Plan, architecture: Architecture, table: FxTable) -> nn.Module:
    """The model with the planned modules swapped for quantized ones."""
    modules = {path: type(module).__name__ for path, module in model.named_modules()}
    planned = {site.name: site.op for site in plan.sites}
    check_same("site", planned, {name: modules[name] for name in planned if name in modules})
    blank = without_weights(model)
    return EagerPart(plan, blank, Inputs()).swapped(blank)
