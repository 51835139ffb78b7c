"""One traced part of a model, from its plan to its quantized kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn

from qrecipe.audit.sample import Sample
from qrecipe.execution.engine import engine
from qrecipe.execution.fake_quants import accompany_training, frozen_copy
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.audit import audit, audit_reference
from qrecipe.execution.fx.configs import Configs
from qrecipe.execution.fx.emission import Emission, emit
from qrecipe.execution.fx.exportable import exportable
from qrecipe.execution.fx.numerics import run_on_head, run_until_judgeable
from qrecipe.execution.fx.reference import hold, make_judge
from qrecipe.execution.fx.unrounded import check_conversion
from qrecipe.execution.part import Exportable
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Part
from qrecipe.model.rewrite_proof import prove_prepared
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import LintTable


@dataclass(frozen=True, slots=True)
class FxPart:
    """A part of the inventory with the plan in its graph; ``plan`` holds its own sites alone.

    ``unjudged`` are the sites that may saturate on this CPU, being made for another.
    """

    source: Part
    plan: Plan
    emission: Emission
    configs: Configs
    unjudged: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.source.path

    def prepare(self) -> fx.GraphModule:
        """The part with observers or fake-quants inserted, on a copy.

        Raises ``PlanError`` (QR306) where it computes something else than the caller's model.
        """
        graph_module = self.source.graph_module
        prepared = execution.prepared_copy(graph_module, self.emission, self.configs)
        prove_prepared(prepared, graph_module, self.source.example)
        accompany_training(prepared)
        return prepared

    def reference(self, prepared: nn.Module) -> fx.GraphModule:
        """The reference conversion, in float between quantize and dequantize."""
        assert isinstance(prepared, fx.GraphModule)
        return execution.explicit(execution.reference(prepared, self.configs))

    def convert(
        self, prepared: nn.Module, sample: Sample | None, lint: LintTable
    ) -> fx.GraphModule:
        """The quantized part, audited on ``sample``, or on the example inputs without one."""
        assert isinstance(prepared, fx.GraphModule)
        if self.plan.phase == "qat":
            inputs = self.source.inputs if sample is None else sample.inputs
            prepared = frozen_copy(prepared, inputs)
            sample = _run(prepared, inputs)

        if sample is None:  # observers move with what they see
            sample = _run(copy.deepcopy(prepared), self.source.inputs)
        reference = execution.reference(prepared, self.configs)
        check_conversion(reference, prepared, sample, self.plan.phase)
        if self.plan.is_for_export:
            reference = execution.explicit(reference)
            held = hold(reference, prepared)
            proof = run_until_judgeable(reference, sample)
            held.release()
            audit_reference(self.plan, reference, proof, held.wrong, lint)
            return reference

        def make_judging_reference() -> fx.GraphModule:
            judge = execution.reference(prepared, self.configs)
            make_judge(judge, prepared)
            return judge

        make_judge(reference, prepared)
        proof = run_on_head(reference, sample)
        # in place: a second reference is needed only where a kernel is suspected
        converted = execution.lowered(reference, prepared, self.configs, self.plan.engines)
        with engine(self.configs.backend):
            audit(self.plan, converted, proof, make_judging_reference, lint, self.unjudged)
        return converted

    def exportable(self, prepared: nn.Module) -> Exportable:
        """torch's decomposed conversion, audited on the example inputs."""
        assert isinstance(prepared, fx.GraphModule)
        if self.plan.phase == "qat":
            prepared = frozen_copy(prepared, self.source.inputs)
        return exportable(self.plan, prepared, self.source.inputs, self.configs)


def _run(prepared: fx.GraphModule, inputs: Inputs) -> Sample:
    with torch.no_grad():
        return Sample(inputs, inputs.call(prepared))


def compile_part(plan: Plan, part: Part, configs: Configs, unjudged: tuple[str, ...]) -> FxPart:
    """Put what the plan says about a part into its graph, in place."""
    names = {node.meta["site"] for node in part.graph_module.graph.nodes if "site" in node.meta}
    own = plan.restricted_to(names)
    return FxPart(part, own, emit(own, part.graph_module), configs, unjudged)
