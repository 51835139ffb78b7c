"""The fused graphs of a stored model's parts, made again from its float architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from qrecipe.errors.findings import PlanError, TraceError
from qrecipe.execution.part import Recorded
from qrecipe.model.architecture import ArchitectureError, check_same, note_values
from qrecipe.model.caches import with_caches_without_values
from qrecipe.model.call import Inputs
from qrecipe.model.copies import without_weights
from qrecipe.model.exported import exported_part
from qrecipe.model.graph_sites import Inventory, Match, fused_graph, named_sites, structure_of
from qrecipe.model.record import TracedPart
from qrecipe.model.shapes import uninitialised
from qrecipe.model.trace import Subject, Traced, in_training, trace
from qrecipe.model.unfit import all_finite
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import FxTable


def recorded_graphs(
    recorded: Recorded,
) -> tuple[nn.Module, Mapping[str, fx.GraphModule]]:
    """The model without weights, and the graphs of its parts by their paths.

    Raises ``ArchitectureError`` if the sites are not the plan's, or the graphs not those that were
    recorded.
    """
    plan, table = recorded.plan, recorded.table
    blank, parts = without_weights(recorded.model), recorded.architecture.parts
    try:
        fused = {part.path: _fused(blank, part, plan, table) for part in parts}
    except (ArchitectureError, PlanError):
        filled = with_caches_without_values(blank, parts)
        if filled is None:
            raise
        blank = filled
        fused = {part.path: _fused(blank, part, plan, table) for part in parts}
    found: dict[str, Match] = {}
    for graph_module in fused.values():
        found |= named_sites(graph_module, own_backend_config(plan.backend), plan.phase)
    check_same(
        "site",
        {site.name: ", ".join(site.members) for site in plan.sites},
        {
            name: ", ".join(member.name for member in match.operation.members)
            for name, match in found.items()
        },
    )
    recorded.check(Inventory(blank, (), found, structure_of(blank, found, table.roots)))
    for graph_module in fused.values():
        for name, tensor in graph_module.named_parameters():
            if not all_finite(tensor):  # folded from a buffer with arbitrary values
                graph_module.get_parameter(name).data.zero_()
    return blank, fused


def _traced(blank: nn.Module, part: TracedPart, plan: Plan, table: FxTable) -> Traced:
    """The graph of a part, made as it was when the plan was."""
    try:
        return trace(Subject.recorded(blank, part, table))
    except TraceError:
        if plan.executor != "pt2e":
            raise
    return exported_part(blank, part.path, inputs_of(part), table)


def inputs_of(part: TracedPart) -> Inputs:
    """What a part was traced with, without its values."""
    return Inputs(kwargs={**uninitialised(part.shapes), **part.constants})


def _fused(blank: nn.Module, part: TracedPart, plan: Plan, table: FxTable) -> fx.GraphModule:
    traced = _traced(blank, part, plan, table)
    note_values(part, traced.graph_module)
    training = in_training(traced) if plan.phase == "qat" else None
    fused, _ = fused_graph(traced, own_backend_config(plan.backend), training)
    return fused
