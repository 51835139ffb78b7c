"""One traced part of a model, from its plan to its quantized kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_fx import BackendConfig, ConvertCustomConfig, PrepareCustomConfig
from qrecipe.errors import AuditError, Finding
from qrecipe.fx import execution
from qrecipe.fx.audit import audit
from qrecipe.fx.emission import Emission, emit, erase_keep_float
from qrecipe.fx.numerics import ReferenceRun, Sample, run_on_head
from qrecipe.fx.padding import pad_explicitly
from qrecipe.fx.training import accompany_training, frozen_copy
from qrecipe.inputs import Inputs
from qrecipe.inventory import Part
from qrecipe.planning import Plan
from qrecipe.schema import Backend, LintTable


@dataclass(frozen=True, slots=True)
class Configs:
    """What torch is given beside the graph and the rules, the same for all parts."""

    backend: Backend
    backend_config: BackendConfig
    prepare: PrepareCustomConfig
    convert: ConvertCustomConfig


@dataclass(frozen=True, slots=True)
class CompiledPart:
    """A part's graph with the plan in it; ``plan`` holds the sites of this part alone.

    ``preserved`` are the attributes of the model that are kept on the graph.
    """

    path: str
    plan: Plan
    graph_module: fx.GraphModule
    emission: Emission
    inputs: Inputs
    configs: Configs
    preserved: Mapping[str, Any]

    def prepare(self) -> fx.GraphModule:
        """The part with observers or fake-quants inserted, on a copy."""
        prepared = execution.prepared_copy(
            self.graph_module,
            self.emission,
            self.configs.backend_config,
            self.configs.prepare,
            self.preserved,
            self.plan.phase,
        )
        accompany_training(prepared)
        return prepared

    def convert(
        self, prepared: nn.Module, sample: Sample | None, lint: LintTable
    ) -> fx.GraphModule:
        """The quantized part, audited on ``sample``, or on the example inputs without one."""
        configs = self.configs
        assert isinstance(prepared, fx.GraphModule)
        if self.plan.phase == "qat":
            inputs = self.inputs if sample is None else sample.inputs
            prepared = frozen_copy(prepared, inputs)
            sample = _run(prepared, inputs)

        def make_reference() -> fx.GraphModule:
            return execution.reference(prepared, configs.backend_config, configs.convert)

        reference = make_reference()
        if sample is None:  # observers move with what they see
            sample = _run(copy.deepcopy(prepared), self.inputs)
        proof = run_on_head(reference, sample)
        if self.plan.is_for_export:
            return _for_export(proof, make_reference)
        # in place: a second reference is needed only where a kernel is suspected
        converted = execution.lowered(
            reference, prepared, configs.backend, configs.convert, self.plan.engines
        )
        with execution.engine(configs.backend):
            audit(self.plan, converted, proof, make_reference, lint)
        return converted


def _run(prepared: fx.GraphModule, inputs: Inputs) -> Sample:
    with torch.no_grad():
        return Sample(inputs, inputs.call(prepared))


def _for_export(
    proof: ReferenceRun, make_reference: Callable[[], fx.GraphModule]
) -> fx.GraphModule:
    """torch's reference model as it came, after one that runs alike has been run."""
    if proof.error is not None:
        raise AuditError(Finding("QR413", f"the reference model fails: {proof.error}"))
    reference = make_reference()
    pad_explicitly(reference)
    erase_keep_float(reference)
    return reference


def compile_part(
    plan: Plan, part: Part, configs: Configs, preserved: Mapping[str, Any]
) -> CompiledPart:
    """Put what the plan says about a part into its graph, in place."""
    names = {node.meta["site"] for node in part.graph_module.graph.nodes if "site" in node.meta}
    own = plan.restricted_to(names)
    return CompiledPart(
        part.path,
        own,
        part.graph_module,
        emit(own, part.graph_module),
        part.inputs,
        configs,
        preserved,
    )
