"""One traced part of a model, from its plan to its quantized kernels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_fx import BackendConfig, ConvertCustomConfig, PrepareCustomConfig
from qrecipe.audit.sample import Sample
from qrecipe.execution.engine import engine
from qrecipe.execution.fake_quants import accompany_training, frozen_copy
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.audit import audit, audit_reference
from qrecipe.execution.fx.emission import Emission, emit, erase_keep_float
from qrecipe.execution.fx.numerics import run_on_head, run_until_judgeable
from qrecipe.execution.fx.padding import pad_explicitly
from qrecipe.execution.fx.reference import hold, make_judge
from qrecipe.execution.fx.unrounded import check_conversion
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Part
from qrecipe.model.rewrite_proof import prove_prepared
from qrecipe.model.trace_proof import Example
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import Backend, LintTable


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

    ``preserved`` are the attributes of the model that are kept on the graph; ``unjudged`` the sites
    that may saturate on this CPU, being made for another.
    """

    path: str
    plan: Plan
    graph_module: fx.GraphModule
    emission: Emission
    inputs: Inputs
    example: Example
    configs: Configs
    preserved: Mapping[str, Any]
    unjudged: tuple[str, ...]

    def prepare(self) -> fx.GraphModule:
        """The part with observers or fake-quants inserted, on a copy.

        Raises ``PlanError`` (QR306) where it computes something else than the caller's model.
        """
        prepared = execution.prepared_copy(
            self.graph_module,
            self.emission,
            self.configs.backend_config,
            self.configs.prepare,
            self.preserved,
            self.plan.phase,
        )
        prove_prepared(prepared, self.graph_module, self.example)
        accompany_training(prepared)
        return prepared

    def reference(self, prepared: nn.Module) -> fx.GraphModule:
        """The reference conversion, in float between quantize and dequantize."""
        assert isinstance(prepared, fx.GraphModule)
        configs = self.configs
        return _explicit(execution.reference(prepared, configs.backend_config, configs.convert))

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

        if sample is None:  # observers move with what they see
            sample = _run(copy.deepcopy(prepared), self.inputs)
        reference = execution.reference(prepared, configs.backend_config, configs.convert)
        check_conversion(reference, prepared, sample, self.plan.phase)
        if self.plan.is_for_export:
            reference = _explicit(reference)
            held = hold(reference, prepared)
            proof = run_until_judgeable(reference, sample)
            held.release()
            audit_reference(self.plan, reference, proof, held.wrong, lint)
            return reference

        def make_judging_reference() -> fx.GraphModule:
            judge = execution.reference(prepared, configs.backend_config, configs.convert)
            make_judge(judge, prepared)
            return judge

        make_judge(reference, prepared)
        proof = run_on_head(reference, sample)
        # in place: a second reference is needed only where a kernel is suspected
        converted = execution.lowered(
            reference, prepared, configs.backend, configs.convert, self.plan.engines
        )
        with engine(configs.backend):
            audit(self.plan, converted, proof, make_judging_reference, lint, self.unjudged)
        return converted


def _explicit(reference: fx.GraphModule) -> fx.GraphModule:
    """The reference as it is handed on, in place: it pads by itself, and has no marks of ours."""
    pad_explicitly(reference)
    erase_keep_float(reference)
    return reference


def _run(prepared: fx.GraphModule, inputs: Inputs) -> Sample:
    with torch.no_grad():
        return Sample(inputs, inputs.call(prepared))


def compile_part(
    plan: Plan,
    part: Part,
    configs: Configs,
    preserved: Mapping[str, Any],
    unjudged: tuple[str, ...],
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
        part.example,
        configs,
        preserved,
        unjudged,
    )
