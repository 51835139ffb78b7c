"""A whole model whose planned modules torch's `quantize_dynamic` swaps in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import DynamicRecurrent, quantize_dynamic
from qrecipe.audit.modules import forget_qconfigs, take_any_layout
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ArtifactError, ExecutionError, Finding
from qrecipe.errors.text import first_line
from qrecipe.execution.eager.audit import audit
from qrecipe.execution.engine import engine
from qrecipe.execution.part import Exportable
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, structural_copy
from qrecipe.observers.qconfig import qconfig
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import LintTable


@dataclass(frozen=True, slots=True)
class EagerPart:
    """The model as it is, with the plan for it."""

    plan: Plan
    model: nn.Module
    inputs: Inputs
    path: str = ""

    def prepare(self) -> nn.Module:
        """A copy in eval mode that may be run; there is nothing to observe."""
        return runnable_copy(self.model)

    def convert(self, prepared: nn.Module, sample: Sample | None, lint: LintTable) -> nn.Module:
        """The quantized model, audited on ``sample``, or on the example inputs without one.

        Raises ``ExecutionError`` (QR405) where torch fails, and ``AuditError``.
        """
        prepared = runnable_copy(prepared)  # in eval mode, whatever the caller did to it
        proof = sample or _run(prepared, self.inputs)
        converted = self.swapped(prepared)
        with engine(self.plan.backend), quiet():
            audit(self.plan, prepared, converted, proof, lint)
        return converted

    def reference(self, prepared: nn.Module) -> nn.Module:
        """The quantized model itself: dynamic kernels do not saturate."""
        return self.swapped(runnable_copy(prepared))

    def exportable(self, prepared: nn.Module) -> Exportable:
        """Raises ``ArtifactError`` (QR512): exporters want a graph."""
        hint = "export needs one graph of the whole model; QR210 says why there is none"
        raise ArtifactError(Finding("QR512", "an untraced model cannot be exported", hint=hint))

    def swapped(self, prepared: nn.Module) -> nn.Module:
        """A copy with quantized modules in the places of those that are planned, not audited.

        Raises ``ExecutionError`` (QR405) where torch fails.
        """
        converted = structural_copy(prepared)
        forget_qconfigs(converted)  # one that the caller left would be taken for ours
        rules = {
            site.name: qconfig(site.qconfig, "ptq") for site in self.plan.sites if site.qconfig
        }
        with engine(self.plan.backend), quiet():
            try:
                # given no rules, torch would take its own
                if rules:
                    quantize_dynamic(converted, rules, inplace=True)  # type: ignore[no-untyped-call]
            except Exception as error:
                raise ExecutionError(
                    Finding(
                        "QR405",
                        f"torch could not convert the model: {first_line(error)}",
                        hint="leave the named module float, and report the model",
                    )
                ) from error
        self._replace_aliases(converted, rules)
        forget_qconfigs(converted)
        take_any_layout(converted)
        for module in converted.modules():
            if isinstance(module, DynamicRecurrent):
                vars(module)["flatten_parameters"] = _nothing_to_flatten
        return converted

    def _replace_aliases(self, converted: nn.Module, rules: Mapping[str, Any]) -> None:
        """torch swaps a module under the first of its names alone."""
        for alias, path in self.plan.structure.aliases.items():
            if path in rules:
                converted.set_submodule(alias, converted.get_submodule(path))


def _nothing_to_flatten() -> None:
    """What models call on a recurrent layer before they run it; packed weights are flat."""


def _run(prepared: nn.Module, inputs: Inputs) -> Sample:
    with torch.no_grad():
        return Sample(inputs, inputs.call(runnable_copy(prepared)))
