"""A part of a model as a program: prepared, converted and audited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ExecutionError, PlanError
from qrecipe.errors.warn import settle, warn
from qrecipe.execution.clamped import clamp_findings
from qrecipe.execution.fake_quants import accompany_training, frozen_copy
from qrecipe.execution.part import Exportable, Fault, Task, check_exportable
from qrecipe.execution.plain_scales import with_plain_scales
from qrecipe.execution.pt2e.adapters import with_weights_observed
from qrecipe.execution.pt2e.annotation import (
    PlanQuantizer,
    follow,
    forget_annotations,
    observe_clamped,
)
from qrecipe.execution.pt2e.batch_norms import hide_batch_norms, show_batch_norms
from qrecipe.execution.pt2e.biases import freeze_biases, round_biases
from qrecipe.execution.pt2e.capture import captured
from qrecipe.execution.pt2e.inputs import check_first, refuse_empty
from qrecipe.execution.pt2e.module import ProgramModule
from qrecipe.execution.pt2e.numbers import numeric_findings
from qrecipe.execution.pt2e.reference import conversion_findings, reference
from qrecipe.execution.pt2e.scales import shorten_zero_points, store_scales
from qrecipe.execution.pt2e.structure import structure_findings
from qrecipe.execution.pt2e.tables import round_tables, store_tables
from qrecipe.execution.pt2e.torchao import convert_pt2e, models_forgotten, prepare_pt2e
from qrecipe.execution.pt2e.training import check_scales, hidden_drops, trainable, trained
from qrecipe.model.addresses import SITE
from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import runnable_copy, structural_copy
from qrecipe.model.graph_sites import Part
from qrecipe.model.rewrite_proof import check_unchanged, prove_exported, prove_folded
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import failing_as
from qrecipe.process.state import random_numbers_kept
from qrecipe.recipe.schema import LintTable

_REPORT = "leave the named operation float, and report the model"


@dataclass(frozen=True, slots=True)
class ProgramPart:
    """A part of the inventory as a program; ``plan`` holds its own sites alone."""

    path: str
    source: Part
    program: fx.GraphModule
    plan: Plan
    task: Task

    @classmethod
    def of(cls, task: Task, source: Part) -> ProgramPart:
        own = task.plan.restricted_to(sites_of(source.graph_module))
        if own.phase == "qat":
            check_scales(source.graph_module, own)
            for finding in hidden_drops(source.graph_module):
                warn(finding, task.recipe.lint.ignore)
        program = program_of(source.graph_module, source.inputs, own)
        prove_exported(program, source.graph_module, source.example, source.inputs)
        return cls(source.path, source, program, own, task)

    def prepare(self) -> fx.GraphModule:
        check_unchanged(self.source.graph_module, self.source.example)
        return self.prepare_at_once()

    def prepare_at_once(self) -> fx.GraphModule:
        prepared = prepared_program(self.program, self.plan)
        accompany_training(prepared)
        return prepared

    def convert(
        self, prepared: nn.Module, sample: Sample | None, lint: LintTable
    ) -> fx.GraphModule:
        assert isinstance(prepared, fx.GraphModule)
        if self.plan.phase == "qat":
            inputs = self.source.inputs if sample is None else sample.inputs
            frozen = frozen_copy(prepared, inputs)
            sample, prepared = Sample.of(frozen, inputs), trained(frozen)
            prove_folded(prepared, frozen, inputs)
        if sample is None:  # running it would change its observers
            sample = Sample.of(runnable_copy(prepared), self.source.inputs)
        converted = converted_program(prepared, self.plan)
        expected = self.reference(prepared)
        structure = [
            *clamp_findings(prepared),
            *structure_findings(self.plan, self.program, converted),
            *conversion_findings(expected, converted),
        ]
        numbers = numeric_findings(self.plan, expected, converted, sample)
        settle(structure or list(numbers), lint.ignore)
        return converted

    def reference(self, prepared: nn.Module) -> fx.GraphModule:
        assert isinstance(prepared, fx.GraphModule)
        made = reference(prepared)
        round_tables(made, self.plan)
        if self.plan.backend == "executorch":
            round_biases(made)
        return made

    def fault(self, converted: nn.Module, inputs: Inputs) -> Fault | None:
        return None

    def exportable(self, prepared: nn.Module) -> Exportable:
        check_exportable(self.plan)
        converted = self.convert(prepared, None, self.task.recipe.lint)
        inputs, probe = self.source.inputs, runnable_copy(prepared)
        args = bind(converted, converted, inputs)
        with torch.no_grad():
            output, as_float = inputs.cloned().call(converted), inputs.cloned().call(probe)
        return Exportable(with_plain_scales(converted), args, output, as_float)


def program_of(graph_module: fx.GraphModule, inputs: Inputs, plan: Plan) -> fx.GraphModule:
    """The program of a fused graph, which can be trained if the plan says so."""
    if plan.phase == "qat":
        return trainable(graph_module, inputs, plan)
    return captured(graph_module, inputs)


def prepared_program(program: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """A copy of the program with the plan's observers in it.

    Raises ``PlanError`` (QR306) if torchao fails.
    """
    copied, what = structural_copy(program), "torchao cannot prepare the model"
    failing = failing_as(PlanError, "QR306", what, _REPORT)
    with random_numbers_kept(), failing, quiet(), models_forgotten():
        hide_batch_norms(copied)
        made = prepare_pt2e(copied, PlanQuantizer(plan))
        show_batch_norms(made)
    follow(made, plan)
    observe_clamped(made, plan)
    forget_annotations(made)
    return _finished(made)


def converted_program(prepared: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """torchao's conversion, without the float weights that nothing reads any more.

    Raises ``ExecutionError`` (QR405) if torchao fails.
    """
    what = "torchao could not convert the prepared model"
    failing = failing_as(ExecutionError, "QR405", what, _REPORT)
    with random_numbers_kept(), failing, quiet(), models_forgotten(), torch.no_grad():
        observed = with_weights_observed(prepared)  # a copy: conversion changes it
        store_tables(observed, plan)
        hide_batch_norms(observed)
        made = convert_pt2e(observed)
        show_batch_norms(made)
    store_scales(made)
    freeze_biases(made)
    shorten_zero_points(made, plan)
    if plan.backend == "executorch":
        round_biases(made)
    if any(site.mode == "dynamic" for site in plan.sites):
        refuse_empty(made)
    return _finished(made)


def rebuilt_program(graph_module: fx.GraphModule, inputs: Inputs, plan: Plan) -> fx.GraphModule:
    """The converted program of a graph without values, from observers that saw nothing."""
    own = plan.restricted_to(sites_of(graph_module))
    prepared = prepared_program(program_of(graph_module, inputs, own), own)
    # fake-quants that accompany no training observe in eval mode, and must see their weights once
    calibrated = trained(prepared.eval()) if plan.phase == "qat" else prepared
    return converted_program(calibrated, own)


def sites_of(graph_module: fx.GraphModule) -> set[str]:
    """The names of the sites in a graph."""
    return {node.meta[SITE] for node in graph_module.graph.nodes if SITE in node.meta}


def _finished(made: fx.GraphModule) -> fx.GraphModule:
    """The graph with what it calls alone; torchao's own module refuses to be trained or not."""
    check_first(made)
    finished = ProgramModule(made, made.graph)
    finished.meta.update(made.meta)
    return finished
