"""Each site of a plan as a tiny model of its own inside the float graph.

With only one site quantized, its observers see float activations. So all sites can be calibrated
in one forward of the float model, each in a wrapper, with the same ranges as if it were alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from qrecipe.audit.ranges import check_ranges
from qrecipe.errors.warn import settle
from qrecipe.execution.engine import engine
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.emission import emit
from qrecipe.execution.fx.patches import delete_unused_submodules
from qrecipe.execution.fx.reference import pad_explicitly
from qrecipe.execution.fx.structure import structure_findings
from qrecipe.execution.isolated import Calibrate, Isolated, Kernel, LoneSite, WrappedPart
from qrecipe.execution.packing import Kinds
from qrecipe.execution.part import Task
from qrecipe.execution.prepared import forget_preparation, mark_prepared
from qrecipe.model.addresses import SITE
from qrecipe.model.changes import without_changes_in_place
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory, Part
from qrecipe.planning.plan import Plan, Site

_WRAPPER = "qrecipe_site_"


def wrap(part: Part, inventory: Inventory, sites: Sequence[Site]) -> WrappedPart:
    """Put wrappers around the sites of a part, in the part's own graph."""
    graph_module = part.graph_module
    without_changes_in_place(graph_module)
    inside = set(graph_module.graph.nodes)
    nodes = {
        site.name: _wrapped(
            graph_module, inventory.matches[site.name].nodes, site, f"{_WRAPPER}{index}"
        )
        for index, site in enumerate(sites)
        if inventory.matches[site.name].nodes[0] in inside
    }
    graph_module.graph.eliminate_dead_code()
    delete_unused_submodules(graph_module)
    graph_module.recompile()
    lone = [
        LoneSite(site, graph_module.get_submodule(target), graph_module, (target,))
        for site in sites
        if site.name in nodes and (target := str(nodes[site.name].target))
    ]
    return WrappedPart(part.path, graph_module, tuple(lone), nodes)


def _wrapped(
    graph_module: fx.GraphModule, group: Sequence[fx.Node], site: Site, target: str
) -> fx.Node:
    graph, last = fx.Graph(), group[-1]
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    for source in dict.fromkeys(s for node in group for s in node.all_input_nodes):
        if source in group:
            continue
        if source.op == "get_attr":
            copies[source] = graph.node_copy(source)
        else:
            copies[source] = graph.placeholder(source.name)
            copies[source].meta = {"value": source.meta["value"]}
            inputs.append(source)
    for node in group:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[last])
    graph_module.add_submodule(target, fx.GraphModule(graph_module, graph))
    with graph_module.graph.inserting_after(last):
        wrapper = graph_module.graph.call_module(target, tuple(inputs))
    wrapper.meta = {SITE: site.name, "value": last.meta["value"]}
    last.replace_all_uses_with(wrapper)
    for node in reversed(group):
        graph_module.graph.erase_node(node)
    return wrapper


def isolated(task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
    """The graphs of the inventory with wrappers around the sites, and a quantized kernel for each.

    The kernels are calibrated in one run of the float model; those that saturate on this CPU alone
    are references. Raises what `qrecipe.calibrate` and `qrecipe.CompiledRecipe.convert` raise.
    """
    parts = tuple(wrap(part, task.inventory, sites) for part in task.inventory.parts)
    kernels = _calibrated_kernels(task, parts, calibrate)
    whole = _with_graphs(task, parts)
    graph = next((part for part in parts if not part.path), None)
    return Isolated(whole, [lone for part in parts for lone in part.sites], kernels, graph)


def _with_graphs(task: Task, parts: Sequence[WrappedPart]) -> nn.Module:
    graphs = {part.path: part.graph_module for part in parts}
    return with_parts(task.model, graphs, task.recipe.fx.preserved_attributes)


def _calibrated_kernels(
    task: Task, parts: Sequence[WrappedPart], calibrate: Calibrate
) -> dict[str, Kernel]:
    """The kernels by site; the graphs call the float operations afterwards."""
    with engine(task.plan.backend):
        ways = [_Alone.of(lone, task.plan) for part in parts for lone in part.sites]
        for way in ways:
            way.lone.put(way.prepared)
        try:
            observing = _with_graphs(task, parts)
            mark_prepared(observing, task.recipe, "sensitivity", [part.path for part in parts])
            calibrate(observing)
            forget_preparation(observing)
        finally:
            for way in ways:
                way.lone.put(way.lone.original)
        check_ranges(way.prepared for way in ways)
        return {way.lone.site.name: way.kernel(task.unjudged) for way in ways}


@dataclass(frozen=True, slots=True)
class _Alone:
    """A site with the plan for it alone, and its graph with observers."""

    lone: LoneSite
    plan: Plan
    prepared: fx.GraphModule

    @classmethod
    def of(cls, lone: LoneSite, plan: Plan) -> _Alone:
        own, original = replace(plan, sites=(lone.site,)), lone.original
        assert isinstance(original, fx.GraphModule)
        return cls(lone, own, execution.prepared_copy(original, emit(own, original), own))

    def kernel(self, unjudged: Collection[str]) -> Kernel:
        """Its quantized kernel, or the reference of one that saturates on this CPU alone."""
        name, plan = self.lone.site.name, self.plan
        reference, kinds = execution.reference(self.prepared, plan), Kinds()
        converted = execution.lowered(reference, self.prepared, plan, plan.engines, kinds)
        settle(structure_findings(plan, converted, kinds), ())
        if name in unjudged:
            converted = execution.reference(self.prepared, plan)
            pad_explicitly(converted)
        return Kernel(name, converted.eval())
