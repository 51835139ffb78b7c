"""Each site of a plan as a tiny model of its own inside the float graph.

With only one site quantized, its observers see float activations. So all sites can be calibrated
in one forward of the float model, each in a wrapper, with the same ranges as if it were alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_fx import BackendConfig, ConvertCustomConfig, PrepareCustomConfig
from qrecipe.audit.ranges import range_findings
from qrecipe.errors.findings import (
    AuditError,
    CalibrationError,
    ExecutionError,
    Finding,
    error_from,
)
from qrecipe.errors.text import first_line
from qrecipe.execution.batches import Forward
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.engine import engine
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.emission import emit
from qrecipe.execution.fx.padding import pad_explicitly
from qrecipe.execution.fx.structure import structure_findings
from qrecipe.execution.prepared import forget_preparation, mark_prepared
from qrecipe.measure.out_of_place import without_changes_in_place
from qrecipe.model.addresses import SITE
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory, Part
from qrecipe.model.nested import map_tensors
from qrecipe.planning.backend import backend_config
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.patterns import leave_float
from qrecipe.recipe.recipe import Recipe
from qrecipe.terminal.progress import Progress

_WRAPPER = "qrecipe_site_"


class Replaceable(Protocol):
    """A site of a float model that can be replaced."""

    @property
    def site(self) -> Site: ...

    @property
    def original(self) -> nn.Module:
        """The module that computes it in float."""

    def put(self, module: nn.Module) -> None:
        """Make the model call ``module`` at this site."""


@dataclass(frozen=True, slots=True)
class LoneSite:
    """A site that is quantized alone: its wrapper in a graph, and the wrapper's contents.

    ``node`` calls the submodule ``target`` of the graph with the site's inputs in order;
    ``original`` is the float operation as a graph of its own.
    """

    site: Site
    node: fx.Node
    target: str
    original: fx.GraphModule

    def put(self, module: nn.Module) -> None:
        """Make the graph call ``module`` at this site."""
        owner = self.node.graph.owning_module
        assert owner is not None
        setattr(owner, self.target, module)


@dataclass(frozen=True, slots=True)
class WrappedPart:
    """A part of a model as its float graph, with a wrapper around each site to be ranked."""

    path: str
    graph_module: fx.GraphModule
    sites: tuple[LoneSite, ...]


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


def wrap(part: Part, inventory: Inventory, sites: Iterable[Site]) -> WrappedPart:
    """Put wrappers around the sites of a part, in the part's own graph."""
    graph_module = part.graph_module
    without_changes_in_place(graph_module)
    inside = set(graph_module.graph.nodes)
    lone = [
        _wrapped(graph_module, inventory.matches[site.name].nodes, site, f"{_WRAPPER}{index}")
        for index, site in enumerate(sites)
        if inventory.matches[site.name].nodes[0] in inside
    ]
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return WrappedPart(part.path, graph_module, tuple(lone))


def _wrapped(
    graph_module: fx.GraphModule, group: Sequence[fx.Node], site: Site, target: str
) -> LoneSite:
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
    original = fx.GraphModule(graph_module, graph)
    graph_module.add_submodule(target, original)
    with graph_module.graph.inserting_after(last):
        wrapper = graph_module.graph.call_module(target, tuple(inputs))
    wrapper.meta = {SITE: site.name, "value": last.meta["value"]}
    last.replace_all_uses_with(wrapper)
    for node in reversed(group):
        graph_module.graph.erase_node(node)
    return LoneSite(site, wrapper, target, original)


class Kernel(nn.Module):
    """A quantized site in a float graph that returns the memory format of its input.

    Quantized convolutions return channels_last, which can halve the speed of the float rest.
    """

    def __init__(self, name: str, converted: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.converted = converted

    def forward(self, *inputs: Any, **named: Any) -> Any:
        memory_format = _memory_format(inputs)

        def formatted(value: Tensor) -> Tensor:
            is_image = value.dim() == 4
            return value.contiguous(
                memory_format=memory_format if is_image else torch.contiguous_format
            )

        try:
            result = self.converted(*inputs, **named)
        except Exception as error:
            text = f"the quantized kernel of {self.name} fails: {first_line(error)}"
            raise AuditError(Finding("QR413", text, hint=leave_float(self.name))) from error
        return map_tensors(formatted, result)


def _memory_format(inputs: Sequence[Any]) -> torch.memory_format:
    first = next((x for x in inputs if isinstance(x, Tensor) and x.dim() == 4), None)
    if first is None or first.is_contiguous():
        return torch.contiguous_format
    last = torch.channels_last
    return last if first.is_contiguous(memory_format=last) else torch.contiguous_format


def _side_by_side(part: WrappedPart) -> fx.GraphModule:
    """All sites of a part in one graph, not connected, so that one pass prepares them all.

    Its inputs are those of the first site, then those of the second, and so on.
    """
    graph = fx.Graph()
    results: list[fx.Node] = []
    for lone in part.sites:
        copies: dict[fx.Node, fx.Node] = {}
        for node in lone.original.graph.nodes:
            if node.op == "output":
                results.append(copies[node.args[0]])
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copies[node].target = f"{lone.target}.{node.target}"
            elif node.op == "placeholder":
                copies[node].target = copies[node].name  # unique, even if sites read the same value
    graph.output(tuple(results))
    return fx.GraphModule(part.graph_module, graph)


def _taken_apart(together: fx.GraphModule, count: int) -> list[fx.GraphModule]:
    """Split `_side_by_side`, prepared or converted, into one graph per site again."""
    output = next(reversed(together.graph.nodes))
    results: Sequence[fx.Node] = output.args[0]
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


def calibrated_kernels(
    model: nn.Module,
    wrapped: Sequence[WrappedPart],
    plan: Plan,
    recipe: Recipe,
    batches: Iterable[Any],
    forward: Forward | None,
    progress: Progress | bool | None,
    unjudged: Collection[str],
) -> dict[str, Kernel]:
    """The quantized kernel of each wrapped site by name, calibrated in one run of the float model.

    Sites in ``unjudged`` saturate on this CPU only and are replaced by their references.
    Afterwards the graphs call the float operations. Raises what `qrecipe.calibrate` and
    `qrecipe.CompiledRecipe.convert` raise.
    """
    config = backend_config(plan.backend, "ptq")
    parts = [part for part in wrapped if part.sites]
    sites = [lone for part in parts for lone in part.sites]
    kernels: dict[str, Kernel] = {}
    with engine(plan.backend):
        prepared = [_prepared(part, plan, config) for part in parts]
        for part, together in zip(parts, prepared, strict=True):
            for lone, alone in zip(
                part.sites, _taken_apart(together, len(part.sites)), strict=True
            ):
                lone.put(alone)
        try:
            observing = with_parts(model, {part.path: part.graph_module for part in wrapped})
            mark_prepared(observing, recipe, "sensitivity", [part.path for part in wrapped])
            calibrate(observing, batches, forward=forward, progress=progress)
            forget_preparation(observing)
        finally:
            for lone in sites:
                lone.put(lone.original)
        findings = [finding for together in prepared for finding in range_findings(together)]
        if findings:
            raise CalibrationError(findings)
        for part, together in zip(parts, prepared, strict=True):
            converted = _converted(part, plan, config, together)
            kernels |= _kernels_of(part, converted)
            if unjudged:
                reference = execution.reference(together, config, ConvertCustomConfig())
                pad_explicitly(reference)
                references = _kernels_of(part, reference)
                kernels |= {name: references[name] for name in references.keys() & {*unjudged}}
    return kernels


def _kernels_of(part: WrappedPart, converted: fx.GraphModule) -> dict[str, Kernel]:
    alone = _taken_apart(converted, len(part.sites))
    names = [lone.site.name for lone in part.sites]
    return {name: Kernel(name, graph.eval()) for name, graph in zip(names, alone, strict=True)}


def _prepared(part: WrappedPart, plan: Plan, config: BackendConfig) -> fx.GraphModule:
    together = _side_by_side(part)
    emission = emit(_plan_of(part, plan), together)
    return execution.prepared_copy(together, emission, config, PrepareCustomConfig(), {}, "ptq")


def _converted(
    part: WrappedPart, plan: Plan, config: BackendConfig, prepared: fx.GraphModule
) -> fx.GraphModule:
    custom = ConvertCustomConfig()
    reference = execution.reference(prepared, config, custom)
    own = _plan_of(part, plan)
    converted = execution.lowered(reference, prepared, plan.backend, custom, own.engines)
    findings = list(structure_findings(own, converted))
    if findings:
        raise error_from(findings)
    return converted


def _plan_of(part: WrappedPart, plan: Plan) -> Plan:
    return plan.restricted_to({lone.site.name for lone in part.sites})


def float_model(model: nn.Module, wrapped: Sequence[WrappedPart]) -> nn.Module:
    """The model with its parts replaced by the wrapped float graphs."""
    return with_parts(model, {part.path: part.graph_module for part in wrapped})


def check_any(sites: Sequence[Site], reasons: Mapping[str, str]) -> None:
    """Raises ``ExecutionError`` (QR422) if there is no site to rank."""
    if not sites:
        raise ExecutionError(
            Finding(
                "QR422",
                f"the plan quantizes none of {len(reasons)} sites with a range of its own",
                hint="`qrecipe plan` shows why each stays float",
            )
        )
