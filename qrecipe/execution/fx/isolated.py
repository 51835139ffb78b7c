"""Each site of a plan as a tiny model of its own inside the float graph.

With only one site quantized, its observers see float activations. So all sites can be calibrated
in one forward of the float model, each in a wrapper, with the same ranges as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from qrecipe._torch_fx import attach_preserved_attrs_to_model
from qrecipe.audit.ranges import range_findings
from qrecipe.errors.findings import CalibrationError
from qrecipe.errors.warn import settle
from qrecipe.execution.engine import engine
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.convert import Configs
from qrecipe.execution.fx.emission import emit
from qrecipe.execution.fx.patches import delete_unused_submodules
from qrecipe.execution.fx.reference import pad_explicitly
from qrecipe.execution.fx.structure import structure_findings
from qrecipe.execution.isolated import Calibrate, Isolated, Kernel, LoneSite, WrappedPart
from qrecipe.execution.packing import Kinds
from qrecipe.execution.part import Task
from qrecipe.execution.prepared import forget_preparation, mark_prepared
from qrecipe.model.addresses import SITE
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory, Part
from qrecipe.model.out_of_place import without_changes_in_place
from qrecipe.planning.plan import Plan, Site

_WRAPPER = "qrecipe_site_"

_AT_ONCE = 256
"""How many sites to prepare in one graph: torch goes through all its results for each of them."""


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


def _side_by_side(part: WrappedPart) -> fx.GraphModule:
    """The sites of a part in one graph, not connected, so that one pass prepares them all.

    Its inputs are those of the first site, then those of the second, and so on.
    """
    graph = fx.Graph()
    results: list[fx.Node] = []
    for lone in part.sites:
        copies: dict[fx.Node, fx.Node] = {}
        original: Any = lone.original
        for node in original.graph.nodes:
            if node.op == "output":
                results.append(copies[node.args[0]])
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copies[node].target = f"{lone.names[0]}.{node.target}"
            elif node.op == "placeholder":
                copies[node].target = copies[node].name  # unique, even if sites read the same value
    graph.output(tuple(results))
    return fx.GraphModule(part.graph_module, graph)


def _taken_apart(together: fx.GraphModule, count: int) -> list[fx.GraphModule]:
    """Split `_side_by_side`, prepared or converted, into one graph per site again."""
    output = together.graph.output_node()
    results: Any = output.args[0]
    assert len(results) == count
    owner: dict[fx.Node, int] = {}
    for index, result in enumerate(results):
        waiting = [result]
        while waiting:
            node = waiting.pop()
            if node not in owner:
                owner[node] = index
                waiting += node.all_input_nodes
    graphs = [fx.Graph() for _ in results]
    copies: dict[fx.Node, fx.Node] = {}
    for node in together.graph.nodes:
        if node in owner:
            copies[node] = graphs[owner[node]].node_copy(node, copies.__getitem__)
    for graph, result in zip(graphs, results, strict=True):
        graph.output(copies[result])
    return [fx.GraphModule(together, graph) for graph in graphs]


def isolated(task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
    """The graphs of the inventory with wrappers around the sites, and a quantized kernel for each.

    The kernels are calibrated in one run of the float model; those that saturate on this CPU alone
    are references. Raises what `qrecipe.calibrate` and `qrecipe.CompiledRecipe.convert` raise.
    """
    parts = tuple(wrap(part, task.inventory, sites) for part in task.inventory.parts)
    kernels = _calibrated_kernels(task, parts, calibrate)
    whole = _with_graphs(task.model, parts)
    graph = next((part for part in parts if not part.path), None)
    if graph is not None:
        names = task.recipe.fx.preserved_attributes
        preserved = {name: getattr(task.model, name) for name in names}
        attach_preserved_attrs_to_model(graph.graph_module, preserved)
    return Isolated(whole, [lone for part in parts for lone in part.sites], kernels, graph)


def _with_graphs(model: nn.Module, parts: Sequence[WrappedPart]) -> nn.Module:
    return with_parts(model, {part.path: part.graph_module for part in parts})


def _calibrated_kernels(
    task: Task, wrapped: Sequence[WrappedPart], calibrate: Calibrate
) -> dict[str, Kernel]:
    """The kernels by site; the graphs call the float operations afterwards."""
    configs = Configs.of(task.plan, task.model)
    parts = [
        replace(part, sites=part.sites[start : start + _AT_ONCE])
        for part in wrapped
        for start in range(0, len(part.sites), _AT_ONCE)
    ]
    kernels: dict[str, Kernel] = {}
    with engine(task.plan.backend):
        prepared = [
            execution.prepared_copy(
                together := _side_by_side(part), emit(_plan_of(part, task.plan), together), configs
            )
            for part in parts
        ]
        for part, together in zip(parts, prepared, strict=True):
            for lone, alone in zip(
                part.sites, _taken_apart(together, len(part.sites)), strict=True
            ):
                lone.put(alone)
        try:
            observing = _with_graphs(task.model, wrapped)
            mark_prepared(observing, task.recipe, "sensitivity", [part.path for part in wrapped])
            calibrate(observing)
            forget_preparation(observing)
        finally:
            for lone in (lone for part in parts for lone in part.sites):
                lone.put(lone.original)
        findings = [finding for together in prepared for finding in range_findings(together)]
        if findings:
            raise CalibrationError(findings)
        for part, together in zip(parts, prepared, strict=True):
            own = _plan_of(part, task.plan)
            reference = execution.reference(together, configs)
            kinds: Kinds = {}
            converted = execution.lowered(reference, together, configs, own.engines, kinds)
            settle(structure_findings(own, converted, kinds), ())
            kernels |= _kernels_of(part, converted)
            if task.unjudged:
                reference = execution.reference(together, configs)
                pad_explicitly(reference)
                references = _kernels_of(part, reference)
                kernels |= {name: references[name] for name in references.keys() & task.unjudged}
    return kernels


def _kernels_of(part: WrappedPart, converted: fx.GraphModule) -> dict[str, Kernel]:
    alone = _taken_apart(converted, len(part.sites))
    names = [lone.site.name for lone in part.sites]
    return {name: Kernel(name, graph.eval()) for name, graph in zip(names, alone, strict=True)}


def _plan_of(part: WrappedPart, plan: Plan) -> Plan:
    return plan.restricted_to({lone.site.name for lone in part.sites})
