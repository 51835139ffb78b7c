"""A stored plan on the float architecture: traced, fused, prepared and converted without data."""

from __future__ import annotations

import torch
from torch import fx, nn

from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.configs import Configs
from qrecipe.execution.fx.emission import emit
from qrecipe.model.architecture import check_same, note_values
from qrecipe.model.copies import with_parts, without_weights
from qrecipe.model.graph_sites import Match, fused_graph, named_sites
from qrecipe.model.record import Architecture, TracedPart
from qrecipe.model.trace import trace
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import FxTable


def rebuilt(model: nn.Module, plan: Plan, architecture: Architecture, table: FxTable) -> nn.Module:
    """The model with its traced parts replaced by converted graphs.

    Raises ``ArchitectureError``.
    """
    configs = Configs.of(plan, model, table.preserved_attributes)
    blank = without_weights(model)
    fused = {part.path: _fused(blank, part, plan, table, configs) for part in architecture.parts}
    found: dict[str, Match] = {}
    for graph_module in fused.values():
        found |= named_sites(graph_module, configs.backend_config, plan.phase)
    check_same(
        "site",
        {site.name: ", ".join(site.members) for site in plan.sites},
        {
            name: ", ".join(member.name for member in match.operation.members)
            for name, match in found.items()
        },
    )
    return with_parts(
        blank, {path: _converted(graph, plan, configs) for path, graph in fused.items()}
    )


def _fused(
    blank: nn.Module, recorded: TracedPart, plan: Plan, table: FxTable, configs: Configs
) -> fx.GraphModule:
    graph_module, scopes = trace(blank, recorded.path, recorded.constants, table)
    note_values(recorded, graph_module)
    alone = {site.members for site in plan.sites}

    def is_apart(node: fx.Node) -> bool:
        return (node.meta["member"].name,) in alone

    return fused_graph(
        graph_module, scopes, recorded.path, configs.backend_config, plan.phase, apart=is_apart
    )


def _converted(graph_module: fx.GraphModule, plan: Plan, configs: Configs) -> fx.GraphModule:
    for name, tensor in graph_module.named_parameters():
        if not torch.isfinite(tensor).all():  # folded from a buffer with arbitrary values
            graph_module.get_parameter(name).data.zero_()
    # not FxPart.prepare: its fake-quants don't observe in eval mode, and these must see the shapes
    # of their weights once
    prepared = execution.prepared_copy(graph_module, emit(plan, graph_module), configs).eval()
    reference = execution.reference(prepared, configs)
    if plan.is_for_export:
        return execution.explicit(reference)
    return execution.lowered(reference, prepared, configs, plan.engines)
