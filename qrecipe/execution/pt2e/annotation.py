"""Plan -> torchao: one annotation for every operator of a quantized site, none for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from qrecipe.execution.clamped import Clamped
from qrecipe.execution.pt2e.adapters import (
    ACTIVATION,
    WEIGHT,
    Adapter,
    Follower,
    adapter_at,
    quantization_spec,
)
from qrecipe.execution.pt2e.operands import (
    constant_nodes,
    gives_integers,
    gives_tensor,
    input_spec,
    is_float,
    is_static,
    nodes_of_sites,
    operands,
)
from qrecipe.execution.pt2e.torchao import (
    QuantizationAnnotation,
    Quantizer,
    SharedQuantizationSpec,
)
from qrecipe.model.addresses import DROPS, site_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import TensorSpec

_ANNOTATION = "quantization_annotation"

_Edge = tuple[fx.Node, fx.Node]
"""What gives a tensor, and what reads it."""


def annotation_of(node: fx.Node) -> QuantizationAnnotation:
    """The annotation of a node, to which more can be added."""
    made = QuantizationAnnotation({}, None, _annotated=True)
    return node.meta.setdefault(_ANNOTATION, made)


class PlanQuantizer(Quantizer):  # type: ignore[misc]
    """Tells torchao what the plan says."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        sites = {site.name: site for site in self.plan.sites}
        constant = constant_nodes(model)
        for name, nodes in nodes_of_sites(model, self.plan).items():
            if sites[name].mode is not None:
                computing = [node for node in nodes if node not in constant]  # not a weight
                _Annotator(sites[name], computing or nodes, sites, self.plan).annotate()
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """The audit does that, on what has become of the model."""


@dataclass(frozen=True, slots=True)
class _Annotator:
    """Annotates the operators of one site."""

    site: Site
    nodes: Sequence[fx.Node]
    sites: Mapping[str, Site]
    plan: Plan

    def annotate(self) -> None:
        first = next(self._entries(), None)
        for node in self.nodes:
            for edge, spec in self._inputs(node, first):
                annotation_of(edge[1]).input_qspec_map[edge[0]] = spec
            annotation_of(node).output_qspec = self._output(node, first)

    def _entries(self) -> Iterator[_Edge]:
        """The edges on which data comes into the site."""
        for node in self.nodes:
            for source, role in operands(node):
                if role == "data" and not self._is_own(source) and is_float(source):
                    yield self._observed(source, node)

    def _is_own(self, node: fx.Node) -> bool:
        return site_of(node) == self.site.name

    def _observed(self, source: fx.Node, node: fx.Node) -> _Edge:
        """The edge to observe: before what drops in training, which scales up the rest."""
        while DROPS in source.meta and all(map(self._gives_integers, source.users)):
            source, node = source.all_input_nodes[0], source
        return source, node

    def _gives_integers(self, node: fx.Node) -> bool:
        return DROPS in node.meta or gives_integers(self.sites.get(site_of(node) or ""))

    def _inputs(self, node: fx.Node, first: _Edge | None) -> Iterator[tuple[_Edge, Any]]:
        qconfig, own = self.site.qconfig, input_spec(self.site, self.plan)
        assert qconfig is not None
        for source, role in operands(node):
            if role == "weight":
                if qconfig.weight is not None:
                    yield (source, node), self._spec_of_weight(qconfig.weight, source)
                continue
            if self._is_own(source) or role == "parameter" or not is_float(source):
                continue
            edge = self._observed(source, node)
            if self._follows and edge != first:
                yield edge, SharedQuantizationSpec(first)
            elif is_static(self.site) and self._gives_integers(edge[0]):
                yield edge, SharedQuantizationSpec(edge[0])
            elif own is not None:
                yield edge, quantization_spec(own, self.plan.phase, ACTIVATION)

    def _spec_of_weight(self, spec: TensorSpec, weight: fx.Node) -> Any:
        channels = int(weight.meta["val"].shape[0])
        return quantization_spec(spec, self.plan.phase, WEIGHT, channels)

    def _output(self, node: fx.Node, first: _Edge | None) -> Any:
        is_read = any(user not in self.nodes for user in node.users)
        if not self.site.gives_integers or not is_read or not gives_tensor(node):
            return None
        if self._follows:
            return SharedQuantizationSpec(first)
        assert self.site.qconfig is not None
        assert self.site.qconfig.activation is not None
        return quantization_spec(self.site.qconfig.activation, self.plan.phase, ACTIVATION)

    @property
    def _follows(self) -> bool:
        return self.site.verdict == "passthrough"


def forget_annotations(prepared: fx.GraphModule) -> None:
    """Remove all annotations, in place: torchao would look for the nodes that they name."""
    for node in prepared.graph.nodes:
        node.meta.pop(_ANNOTATION, None)


def follow(prepared: fx.GraphModule, plan: Plan) -> None:
    """Let the results of sites that only move numbers follow, in place."""
    passing = {site.name for site in plan.sites if site.verdict == "passthrough"}
    for node in prepared.graph.nodes:
        adapter = adapter_at(node)
        if isinstance(adapter, Adapter) and site_of(node.args[0]) in passing:
            prepared.add_submodule(str(node.target), Follower(adapter))


def observe_clamped(prepared: fx.GraphModule, plan: Plan) -> None:
    """Let results that only clamps read be observed as the clamps give them, in place."""
    clamps = plan.clamps
    for node in prepared.graph.nodes:
        adapter = adapter_at(node)
        if not isinstance(adapter, Adapter) or adapter.observer_name == WEIGHT:
            continue
        limits = clamps.get(site_of(node.args[0]) or "")
        if limits is not None:
            clamped = Adapter(Clamped(adapter.observer, limits), ACTIVATION)
            prepared.add_submodule(str(node.target), clamped)
