"""The stored plan on the float architecture: a converted model as it was, but for its state.

Nothing is decided, calibrated or run. The observers only have to give a scale of some kind, so
that torch's own take the places of all that plugins brought.
"""

from __future__ import annotations

from torch import nn

from qrecipe.artifact.metadata import Contents
from qrecipe.errors.findings import Location
from qrecipe.execution.executors import executor_of
from qrecipe.model.architecture import check_same, module_settings
from qrecipe.model.copies import own_all_tensors
from qrecipe.model.graph_sites import (
    module_names,
)
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.stored import StoredPlan, StoredRule, StoredSite
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import QConfigSpec, Rule
from qrecipe.recipe.schema import Constructor, FxTable, TensorSpec
from qrecipe.rules.structure import ModelStructure

_MEMORYLESS = ("placeholder", "fixed_qparams")
"""Observers that know their range, or need none, and decide what torch inserts."""


def rebuilt(model: nn.Module, contents: Contents, plan: StoredPlan, table: FxTable) -> nn.Module:
    """The converted model that the plan gave, with state of the right shapes and of no meaning.

    ``model`` stays as it is, and what it weighs does not matter. Raises ``ArchitectureError``.
    """
    check_same("module", contents.architecture.modules, module_settings(model))
    executor = executor_of(plan.executor)
    with held_back([("", Warning)]):  # of observers that saw nothing
        whole = executor.rebuilt(model, _plan(plan, model), contents.architecture, table)
    own_all_tensors(whole)
    return whole.eval()


def _plan(stored: StoredPlan, model: nn.Module) -> Plan:
    return Plan(
        sites=tuple(map(_site, stored.sites)),
        rules=(),
        findings=(),
        warnings=(),
        boundaries=stored.boundaries,
        recipe=stored.recipe,
        ingredients=(),
        fingerprint=stored.fingerprint,
        backend=stored.backend,
        phase=stored.phase,
        executor=stored.executor,
        structure=ModelStructure((), {}, {}, module_names(model)[1], ()),
    )


def _site(stored: StoredSite) -> Site:
    qconfig = stored.qconfig
    return Site(
        name=stored.name,
        op=stored.op,
        members=stored.members,
        qconfig=None
        if qconfig is None
        else QConfigSpec(_builtin(qconfig.weight), _builtin(qconfig.activation)),
        input=None,
        mode=stored.mode,
        rule=_rule(stored.rule),
        shadowed=(),
        verdict=stored.verdict,
        reason=stored.reason,
        engine=stored.engine,
    )


def _rule(stored: StoredRule) -> Rule:
    return Rule(
        tier=stored.tier,
        key=stored.key,
        qconfig=None,
        label=stored.says,
        reason=stored.reason,
        expect=None,
        optional=False,
        location=Location("recipe", 1, 1, 1),
        layer="recipe",
        overrides=frozenset(),
    )


def _builtin(spec: TensorSpec | None) -> TensorSpec | None:
    """The spec with an observer of torch's own that gives scales of the same shape."""
    if spec is None or spec.observer is None or spec.observer.name in _MEMORYLESS:
        return spec
    per_channel = (spec.qscheme or "").startswith("per_channel")
    name = "per_channel_minmax" if per_channel else "minmax"
    return spec.model_copy(update={"observer": Constructor(name=name), "fake_quant": None})
