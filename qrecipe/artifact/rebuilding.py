"""A stored plan applied to the float architecture: the converted model without its state.

Nothing is decided, calibrated or run. Observers only have to return some scale, so torch's own
replace those of plugins.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from qrecipe.artifact.metadata import StoredModel
from qrecipe.execution.executors import executor_of
from qrecipe.model.architecture import check_same, module_settings
from qrecipe.model.graph_sites import structure_of
from qrecipe.planning.plan import Plan
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.recipe.schema import Constructor, TensorSpec

_MEMORYLESS = ("placeholder", "fixed_qparams")
"""Observers that know their range, or need none, and decide what torch inserts."""


def rebuilt(model: nn.Module, stored: StoredModel) -> nn.Module:
    """The converted model of the plan, with state of the right shapes and meaningless values.

    ``model`` is not changed, and its weights don't matter. Raises ``ArchitectureError``.
    """
    architecture, table = stored.contents.architecture, stored.recipe.fx
    check_same("module", architecture.modules, module_settings(model))
    plan = _without_plugins(stored.plan, model)
    with held_back([("", Warning)]):  # about observers that saw nothing
        whole = executor_of(plan.executor).rebuilt(model, plan, architecture, table)
    return whole.eval()


def _without_plugins(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the model's other names of modules, and with observers of torch's own."""
    sites = tuple(replace(site, qconfig=_with_builtins(site.qconfig)) for site in plan)
    structure = replace(plan.structure, aliases=structure_of(model, {}).aliases)
    return replace(plan, sites=sites, structure=structure)


def _with_builtins(qconfig: QConfigSpec | None) -> QConfigSpec | None:
    if qconfig is None:
        return None
    return QConfigSpec(_builtin(qconfig.weight), _builtin(qconfig.activation))


def _builtin(spec: TensorSpec | None) -> TensorSpec | None:
    """The spec with one of torch's observers that gives scales of the same shape."""
    if spec is None or spec.observer is None or spec.observer.name in _MEMORYLESS:
        return spec
    per_channel = (spec.qscheme or "").startswith("per_channel")
    name = "per_channel_minmax" if per_channel else "minmax"
    return spec.model_copy(update={"observer": Constructor(name=name), "fake_quant": None})
