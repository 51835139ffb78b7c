"""The fused graphs of a stored model's parts, made again from its float architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx, nn

from qrecipe.errors.findings import PlanError, TraceError
from qrecipe.model.architecture import ArchitectureError, check_same, note_values
from qrecipe.model.caches import with_caches_without_values
from qrecipe.model.call import Inputs
from qrecipe.model.copies import without_weights
from qrecipe.model.exported import exported_part
from qrecipe.model.graph_sites import Inventory, Match, fused_graph, named_sites, structure_of
from qrecipe.model.record import Architecture, TracedPart
from qrecipe.model.shapes import uninitialised
from qrecipe.model.trace import Scopes, in_training, trace
from qrecipe.model.unfit import all_finite
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import FxTable


def recorded_graphs(
    model: nn.Module,
    plan: Plan,
    architecture: Architecture,
    table: FxTable,
    check: Callable[[Inventory], None],
) -> tuple[nn.Module, Mapping[str, fx.GraphModule]]:
    """The model without weights, and the graphs of its parts by their paths.

    ``check`` is told the sites. Raises ``ArchitectureError`` if they are not the plan's, or the
    graphs not those that were recorded.
    """
    blank = without_weights(model)
    parts = architecture.parts
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
        found |= named_sites(graph_module, own_backend_config(plan.backend, plan.phase), plan.phase)
    check_same(
        "site",
        {site.name: ", ".join(site.members) for site in plan.sites},
        {
            name: ", ".join(member.name for member in match.operation.members)
            for name, match in found.items()
        },
    )
    check(Inventory(blank, (), found, structure_of(blank, found, table.roots)))
    for graph_module in fused.values():
        for name, tensor in graph_module.named_parameters():
            if not all_finite(tensor):  # folded from a buffer with arbitrary values
                graph_module.get_parameter(name).data.zero_()
    return blank, fused


def _traced(
    blank: nn.Module, recorded: TracedPart, plan: Plan, table: FxTable
) -> tuple[fx.GraphModule, Scopes]:
    """The graph of a part, made as it was when the plan was."""
    try:
        return trace(blank, recorded.path, recorded.constants, table, recorded.shapes)
    except TraceError:
        if plan.executor != "pt2e":
            raise
    graph_module, scopes, _ = exported_part(blank, recorded.path, inputs_of(recorded), table)
    return graph_module, scopes


def inputs_of(recorded: TracedPart) -> Inputs:
    """What a part was traced with, without its values."""
    return Inputs(kwargs={**uninitialised(recorded.shapes), **recorded.constants})


def _fused(blank: nn.Module, recorded: TracedPart, plan: Plan, table: FxTable) -> fx.GraphModule:
    graph_module, scopes = _traced(blank, recorded, plan, table)
    note_values(recorded, graph_module)
    training = None
    if plan.phase == "qat":
        training = in_training(
            blank,
            recorded.path,
            recorded.constants,
            table,
            recorded.shapes,
            graph_module,
        )
    config = own_backend_config(plan.backend, plan.phase)
    fused, _ = fused_graph(graph_module, scopes, recorded.path, config, training)
    return fused
