"""Plan -> torchao: one annotation for every operator of a quantized site, none for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from qrecipe.execution.pt2e.adapters import (
    ACTIVATION,
    WEIGHT,
    Adapter,
    Follower,
    adapter_at,
    quantization_spec,
)
from qrecipe.execution.pt2e.operands import (
    gives_tensor,
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
from qrecipe.model.addresses import site_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import Phase

_ANNOTATION = "quantization_annotation"


class PlanQuantizer(Quantizer):  # type: ignore[misc]
    """Tells torchao what the plan says."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        sites = {site.name: site for site in self.plan.sites}
        for name, nodes in nodes_of_sites(model, self.plan).items():
            if sites[name].mode is not None:
                _Annotator(sites[name], nodes, sites, self.plan.phase).annotate()
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """The audit does that, on what has become of the model."""


@dataclass(frozen=True, slots=True)
class _Annotator:
    """Annotates the operators of one site."""

    site: Site
    nodes: Sequence[fx.Node]
    sites: Mapping[str, Site]
    phase: Phase

    def annotate(self) -> None:
        first = next(self._entries(), None)
        for node in self.nodes:
            node.meta[_ANNOTATION] = QuantizationAnnotation(
                self._inputs(node, first), self._output(node, first), _annotated=True
            )

    def _entries(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The edges on which data comes into the site."""
        for node in self.nodes:
            for source, role in operands(node):
                if role == "data" and source not in self.nodes and is_float(source):
                    yield source, node

    def _inputs(self, node: fx.Node, first: Any) -> dict[fx.Node, Any]:
        found: dict[fx.Node, Any] = {}
        qconfig = self.site.qconfig
        assert qconfig is not None
        for source, role in operands(node):
            if source in self.nodes or role == "parameter" or not is_float(source):
                continue
            if role == "weight":
                if qconfig.weight is not None:
                    found[source] = quantization_spec(qconfig.weight, self.phase, WEIGHT)
            elif self._follows and (source, node) != first:
                found[source] = SharedQuantizationSpec(first)
            elif is_static(self.sites.get(site_of(source) or "")):
                found[source] = SharedQuantizationSpec(source)
            elif qconfig.activation is not None:
                found[source] = quantization_spec(qconfig.activation, self.phase, ACTIVATION)
        return found

    def _output(self, node: fx.Node, first: Any) -> Any:
        is_read = any(user not in self.nodes for user in node.users)
        if not is_static(self.site) or not is_read or not gives_tensor(node):
            return None
        if self._follows:
            return SharedQuantizationSpec(first)
        assert self.site.qconfig is not None
        assert self.site.qconfig.activation is not None
        return quantization_spec(self.site.qconfig.activation, self.phase, ACTIVATION)

    @property
    def _follows(self) -> bool:
        return self.site.verdict == "passthrough"


def follow(prepared: fx.GraphModule, plan: Plan) -> None:
    """Let the results of sites that only move numbers follow, in place."""
    passing = {site.name for site in plan.sites if site.verdict == "passthrough"}
    for node in prepared.graph.nodes:
        adapter = adapter_at(node, prepared)
        if isinstance(adapter, Adapter) and site_of(node.args[0]) in passing:
            prepared.add_submodule(str(node.target), Follower(adapter))
