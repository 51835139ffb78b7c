"""FX graph mode as an executor: compiled, prepared, converted and rebuilt parts of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import fx, nn

from qrecipe._torch_fx import ConvertCustomConfig, PrepareCustomConfig, QConfigMapping
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import CalibrationError, PlanError
from qrecipe.errors.text import quoted_whole
from qrecipe.errors.warn import settle
from qrecipe.execution.batch_sizes import faulty_node, shortfall
from qrecipe.execution.clamped import clamp_findings
from qrecipe.execution.engine import engine
from qrecipe.execution.fake_quants import accompany_training, frozen_copy
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.emission import Emission, emit
from qrecipe.execution.fx.exportable import exportable
from qrecipe.execution.fx.isolated import isolated
from qrecipe.execution.fx.numerics import audit, audit_reference, run_on_head, run_until_judgeable
from qrecipe.execution.fx.observing import OBSERVED
from qrecipe.execution.fx.recovered import recover
from qrecipe.execution.fx.reference import check_conversion, explicit, held, make_judge
from qrecipe.execution.fx.structure import realised_sites
from qrecipe.execution.own_engines import keep_engines, right_engines
from qrecipe.execution.packing import Kinds
from qrecipe.execution.part import Compiled, Exportable, Fault, Recorded, Task, check_exportable
from qrecipe.execution.recorded import recorded_graphs
from qrecipe.model.addresses import SITE, site_of
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.graph_sites import Part
from qrecipe.model.rewrite_proof import check_unchanged, prove_prepared
from qrecipe.model.trace import Subject, line_of, trace_part
from qrecipe.planning.backend import backend_config
from qrecipe.planning.plan import Engine, Plan
from qrecipe.recipe.patterns import leave_float
from qrecipe.recipe.schema import LintTable
from qrecipe.rules.structure import joined

__all__ = [
    "compile",
    "exportable_parts",
    "isolated",
    "realised_sites",
    "rebuilt",
]


def compile(task: Task) -> Compiled:
    """The graphs of the inventory, with the plan in them."""
    parts = tuple(_compiled(task, part) for part in task.inventory.parts)
    graphs = {part.path: part.graph_module for part in task.inventory.parts}
    names = list(task.recipe.fx.preserved_attributes)
    return Compiled(
        parts,
        with_parts(task.model, graphs),
        _mapping(parts),
        backend_config(task.plan.backend),
        PrepareCustomConfig().set_preserved_attributes(names),
        ConvertCustomConfig().set_preserved_attributes(names),
    )


def _compiled(task: Task, part: Part) -> FxPart:
    """The part with its own sites of the plan in its graph, in place."""
    names = {node.meta[SITE] for node in part.graph_module.graph.nodes if SITE in node.meta}
    own = task.plan.restricted_to(names)
    emission = emit(own, part.graph_module)
    return FxPart(part.path, part, own, emission, task)


def _mapping(parts: Sequence[FxPart]) -> QConfigMapping:
    """The very mapping that is executed; with several roots, those of all of them."""
    if not parts[0].path:
        return parts[0].emission.qconfig_mapping
    mapping = QConfigMapping().set_global(None)
    for part in parts:
        for name, qconfig in part.emission.qconfig_mapping.module_name_qconfigs.items():
            mapping.set_module_name(joined(part.path, name), qconfig)
    return mapping


@dataclass(frozen=True, slots=True)
class FxPart:
    """A part of the inventory with the plan in its graph; ``plan`` holds its own sites alone."""

    path: str
    source: Part
    plan: Plan
    emission: Emission
    task: Task

    def prepare(self) -> fx.GraphModule:
        check_unchanged(self.source.graph_module, self.source.example)
        return self.prepare_at_once()

    def prepare_at_once(self) -> fx.GraphModule:
        graph_module = self.source.graph_module
        prepared = execution.prepared_copy(graph_module, self.emission, self.plan)
        prove_prepared(prepared, graph_module, self.source.example)
        accompany_training(prepared)
        return prepared

    def reference(self, prepared: nn.Module) -> fx.GraphModule:
        assert isinstance(prepared, fx.GraphModule)
        return explicit(execution.reference(prepared, self.plan))

    def convert(
        self, prepared: nn.Module, sample: Sample | None, lint: LintTable
    ) -> fx.GraphModule:
        assert isinstance(prepared, fx.GraphModule)
        _check_not_pickled(prepared)
        if self.plan.phase == "qat":
            inputs = self.source.inputs if sample is None else sample.inputs
            prepared = frozen_copy(prepared, inputs)
            sample = Sample.of(prepared, inputs)
        if sample is None:  # running it would change its observers
            sample = Sample.of(runnable_copy(prepared), self.source.inputs)
        settle(clamp_findings(prepared), lint.ignore)
        reference = execution.reference(prepared, self.plan)
        check_conversion(reference, prepared, sample, self.plan.phase)
        if self.plan.is_for_export:
            reference = explicit(reference)
            with held(reference, prepared) as wrong:
                proof = run_until_judgeable(reference, sample)
            audit_reference(self.plan, reference, proof, wrong, lint)
            return reference

        def make_judging_reference() -> fx.GraphModule:
            judge = execution.reference(prepared, self.plan)
            make_judge(judge, prepared)
            return judge

        make_judge(reference, prepared)
        proof = run_on_head(reference, sample)
        # in place: a second reference is only needed if a kernel is suspect
        kinds: Kinds = {}
        converted = execution.lowered(reference, prepared, self.plan, self.plan.engines, kinds)
        make, unjudged = make_judging_reference, self.task.unjudged
        with engine(self.plan.backend):
            audit(self.plan, converted, proof, make, lint, unjudged, kinds)
        return converted

    def fault(self, converted: nn.Module, inputs: Inputs) -> Fault | None:
        assert isinstance(converted, fx.GraphModule)
        usual, traced = self.source.inputs, self.source.traced
        node = faulty_node(self.source.graph_module, usual, inputs)
        if node is None:  # the trace is right: a kernel is to blame
            node = faulty_node(converted, usual, inputs)
            site = None if node is None else site_of(node)
            return None if site is None else Fault(f"the kernel of {site}", leave_float(site))
        line = line_of(Subject.recorded(self.task.model, traced, self.task.recipe.fx), node)
        what = site_of(node) or joined(self.path, node.name)
        return Fault(f"{what} at {line}" if line else what, self._way_out(what))

    def _way_out(self, site: str) -> str | None:
        """How to leave the module out that holds a site; tried at another batch size."""
        around = site.partition(":")[0] if ":" in site else site.rpartition(".")[0]
        if around == self.path:
            return f'remove "{around}" from [fx] roots' if around else None
        model, table = self.task.model, self.task.recipe.fx
        names = (*table.non_traceable_module_name, around)
        without = table.model_copy(update={"non_traceable_module_name": names})
        with suppress(PlanError):
            graph_module = trace_part(model, self.path, self.source.inputs, without).graph_module
            whole = with_parts(model, {self.path: graph_module})
            if shortfall(model, whole, self.task.inputs) is None:
                listed = ", ".join(map(quoted_whole, names))
                return f"leave it float: [fx] non_traceable_module_name = [{listed}]"
        return None

    def exportable(self, prepared: nn.Module) -> Exportable:
        assert isinstance(prepared, fx.GraphModule)
        if self.plan.phase == "qat":
            prepared = frozen_copy(prepared, self.source.inputs)
        return exportable(self.plan, prepared, self.source.inputs)


def _check_not_pickled(prepared: fx.GraphModule) -> None:
    """Raises ``CalibrationError`` (QR406) if it lacks what torch converts it by."""
    if OBSERVED not in prepared.meta:
        raise CalibrationError.of(
            "QR406",
            "this prepared model was pickled, which loses what torch needs to convert it",
            hint="store its state_dict, and load that into the model of compiled.prepare()",
        )


def rebuilt(recorded: Recorded) -> nn.Module:
    blank, fused = recorded_graphs(recorded)
    plan = recorded.plan
    # each weight is packed once, later
    parts = {path: _unaudited(_valueless(graph, plan), plan, {}) for path, graph in fused.items()}
    for part in parts.values():
        keep_engines(part, right_engines(part, plan), plan.backend)
    return with_parts(blank, parts, recorded.table.preserved_attributes)


def exportable_parts(
    recorded: Recorded, converted: Mapping[str, fx.GraphModule], inputs: Mapping[str, Inputs]
) -> Mapping[str, Exportable]:
    check_exportable(recorded.plan)
    _, fused = recorded_graphs(recorded)
    plan = recorded.plan
    convert = partial(_unaudited, plan=plan, engines=plan.engines)
    found: dict[str, Exportable] = {}
    for path, graph_module in fused.items():
        prepared = _valueless(graph_module, plan)
        recover(prepared, converted[path], convert)
        found[path] = exportable(plan, prepared, inputs[path])
    return found


def _valueless(graph_module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """A prepared graph whose observers have seen nothing."""
    # not FxPart.prepare: its fake-quants don't observe in eval mode, and these must see the
    # shapes of their weights once
    return execution.prepared_copy(graph_module, emit(plan, graph_module), plan).eval()


def _unaudited(
    prepared: fx.GraphModule, plan: Plan, engines: Mapping[str, Engine]
) -> fx.GraphModule:
    reference = execution.reference(prepared, plan)
    if plan.is_for_export:
        return explicit(reference)
    return execution.lowered(reference, prepared, plan, engines, {})
