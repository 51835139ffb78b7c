"""Eager mode as an executor: torch's `quantize_dynamic` swaps the planned modules of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import DynamicRecurrent, quantize_dynamic
from qrecipe.audit.modules import forget_qconfigs, take_any_layout
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ArtifactError, ExecutionError
from qrecipe.execution.eager.audit import audit
from qrecipe.execution.eager.scaled import give_scales, take_scales
from qrecipe.execution.engine import engine
from qrecipe.execution.isolated import Calibrate, Isolated, Kernel, LoneSite, plan_of_one
from qrecipe.execution.own_engines import is_linear, pack_linear
from qrecipe.execution.part import Compiled, Exportable, Fault, Realised, Recorded, Task
from qrecipe.model.architecture import check_same
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, structural_copy, without_weights
from qrecipe.model.graph_sites import Inventory, structure_of
from qrecipe.model.module_sites import module_matches
from qrecipe.model.plain_attributes import keep_plain_attributes
from qrecipe.model.scaled_input import class_without_scale
from qrecipe.observers.qconfig import qconfig
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.plan import Plan, Site
from qrecipe.process.memory import failing_as
from qrecipe.process.state import random_numbers_kept
from qrecipe.recipe.schema import LintTable


def compile(task: Task) -> Compiled:
    return Compiled((EagerPart(task.plan, task.model, task.inputs),))


def realised_sites(converted: fx.GraphModule) -> Mapping[str, Realised]:
    return {}  # sites are modules here


def rebuilt(recorded: Recorded) -> nn.Module:
    model, plan = recorded.model, recorded.plan
    modules = {path: class_without_scale(module).__name__ for path, module in model.named_modules()}
    planned = {site.name: site.op for site in plan.sites}
    check_same("site", planned, {name: modules[name] for name in planned if name in modules})
    blank = without_weights(model)
    matches = module_matches(blank, planned, own_backend_config(plan.backend))
    recorded.check(Inventory(blank, (), matches, structure_of(blank, matches)))
    return EagerPart(plan, blank, Inputs()).swapped(blank)


def exportable_parts(
    recorded: Recorded, converted: Mapping[str, fx.GraphModule], inputs: Mapping[str, Inputs]
) -> Mapping[str, Exportable]:
    raise _not_exportable()


def _not_exportable() -> ArtifactError:
    hint = "export needs one graph of the whole model; QR210 says why there is none"
    return ArtifactError.of("QR512", "an untraced model cannot be exported", hint=hint)


@dataclass(frozen=True, slots=True)
class EagerPart:
    """The untraced model with its plan."""

    plan: Plan
    model: nn.Module
    inputs: Inputs
    path: str = ""

    def prepare(self) -> nn.Module:
        return runnable_copy(self.model)  # there is nothing to observe

    def prepare_at_once(self) -> nn.Module:
        return self.prepare()

    def convert(self, prepared: nn.Module, sample: Sample | None, lint: LintTable) -> nn.Module:
        prepared = runnable_copy(prepared)  # in eval mode, even if the caller changed that
        proof = sample or Sample.of(runnable_copy(prepared), self.inputs)
        converted = self.swapped(prepared)
        with engine(self.plan.backend), quiet():
            audit(self.plan, prepared, converted, proof, lint)
        return converted

    def reference(self, prepared: nn.Module) -> nn.Module:
        return self.swapped(runnable_copy(prepared))  # dynamic kernels do not saturate

    def fault(self, converted: nn.Module, inputs: Inputs) -> Fault | None:
        return None  # there is no graph to find it in

    def exportable(self, prepared: nn.Module) -> Exportable:
        raise _not_exportable()

    def swapped(self, prepared: nn.Module) -> nn.Module:
        """A copy with the planned modules swapped for quantized ones, not audited.

        Raises ``ExecutionError`` (QR405) if torch fails.
        """
        converted = structural_copy(prepared)
        forget_qconfigs(converted)  # torch would use one that the caller left
        rules = {
            site.name: qconfig(site.qconfig, "ptq") for site in self.plan.sites if site.qconfig
        }
        factors = take_scales(converted)
        what = "torch could not convert the model"
        hint = "leave the named module float, and report the model"
        with (
            engine(self.plan.backend),
            failing_as(ExecutionError, "QR405", what, hint),
            quiet(),
            random_numbers_kept(),  # torch draws weights
        ):
            if rules:  # without rules, torch would use its own
                quantize_dynamic(converted, rules, inplace=True)  # type: ignore[no-untyped-call]
        for path, own in self.plan.engines.items():
            layer = converted.get_submodule(path)
            if is_linear(layer):
                pack_linear(layer, own)
        _look_up_4_bits(converted, self.plan)
        for path in rules:
            keep_plain_attributes(prepared.get_submodule(path), converted.get_submodule(path))
        give_scales(converted, factors)
        for alias, path in self.plan.structure.aliases.items():
            if path in rules:  # torch swaps a module under its first name alone
                converted.set_submodule(alias, converted.get_submodule(path))
        forget_qconfigs(converted)
        take_any_layout(converted)
        for module in converted.modules():
            if isinstance(module, DynamicRecurrent):
                vars(module)["flatten_parameters"] = _nothing_to_flatten
        return converted


def _look_up_4_bits(converted: nn.Module, plan: Plan) -> None:
    """Let tables of 4 bits be read as such, in place: torch's eager mode reads bytes."""
    for site in plan.sites:
        if site.qconfig and site.qconfig.weight and site.qconfig.weight.dtype == "uint4":
            embedding: Any = converted.get_submodule(site.name)
            embedding.dtype = embedding._packed_params.dtype = torch.quint4x2


def _nothing_to_flatten() -> None:
    """Stands for ``flatten_parameters`` of recurrent layers; packed weights are flat already."""


def isolated(task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
    # nothing is calibrated: untraced models are quantized dynamically or weight-only
    owner = runnable_copy(task.model)
    aliases = task.plan.structure.aliases
    lone = [
        LoneSite(
            site,
            owner.get_submodule(site.name),
            owner,
            (site.name, *(alias for alias, path in aliases.items() if path == site.name)),
        )
        for site in sites
    ]
    return Isolated(owner, lone, {site.name: _kernel(task, site) for site in sites})


def _kernel(task: Task, only: Site) -> Kernel:
    part = EagerPart(plan_of_one(only, task.plan), task.model, task.inputs)
    converted = part.convert(part.prepare(), None, LintTable(ignore=("QR203",)))
    return Kernel(only.name, converted.get_submodule(only.name))
