"""The pipeline: plan, compile, prepare, calibrate, convert, audit."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from qrecipe._torch_fx import (
    BackendConfig,
    ConvertCustomConfig,
    PrepareCustomConfig,
    QConfigMapping,
)
from qrecipe.audit.around_roots import around_findings, call_findings, dtype_findings
from qrecipe.audit.ranges import check_calibrated, check_trained
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import CalibrationError, Finding, PlanError
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.warn import settle, warn
from qrecipe.execution.batch_sizes import size_findings
from qrecipe.execution.batches import Forward, inputs_of_batch, rereadable
from qrecipe.execution.calibration import calibrate_checking
from qrecipe.execution.engine import check_engine, engine_of
from qrecipe.execution.executors import executor_of
from qrecipe.execution.failing_observers import failing_observers_named
from qrecipe.execution.joined import joined
from qrecipe.execution.own_engines import forget_calls
from qrecipe.execution.part import Exportable, Part, Task
from qrecipe.execution.prepared import (
    PreparedState,
    forget_preparation,
    mark_prepared,
    prepared_state,
    traced_parts,
)
from qrecipe.execution.provenance import Provenance, attach, make_provenance
from qrecipe.execution.shards import check_same, first_of_all
from qrecipe.model.architecture import recorded_modules
from qrecipe.model.call import Inputs, given_names
from qrecipe.model.copies import own_tensors, with_parts
from qrecipe.model.graph_sites import Inventory, prove_by_call
from qrecipe.model.record import Architecture
from qrecipe.model.trace_proof import Example
from qrecipe.planning.asked import executed_by
from qrecipe.planning.decide import decide, plan_of, warn_of_missed
from qrecipe.planning.inventory import inventory_of, unproven_inventory_of
from qrecipe.planning.masked_sums import int8_sums
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu, unjudged_finding, unjudged_sites
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Recipe, load_recipe
from qrecipe.recipe.schema import Executor
from qrecipe.terminal.progress import Progress
from qrecipe.transforms.transform import ready


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CompiledRecipe(ShortRepr):
    """A recipe that is planned for one model and ready to be executed.

    ``graph_module`` is the traced model; with ``[fx] roots`` it is a copy of the model with each
    root replaced by a graph. ``qconfig_mapping`` is the mapping that is executed; with several
    roots, the mappings of all of them. It is keyed by the module paths and scopes of
    ``graph_module``, and not meant for ``prepare_fx`` on your own model. It, the graph and the
    configs of FX are None for a model that cannot be traced.
    ``unjudged`` are the sites that need VNNI if this CPU has none: conversion checks them with
    7 bits.
    """

    plan: Plan
    recipe: Recipe
    graph_module: nn.Module | None = field(repr=False)
    qconfig_mapping: QConfigMapping | None = field(repr=False)
    backend_config: BackendConfig | None = field(repr=False)
    prepare_custom_config: PrepareCustomConfig | None = field(repr=False)
    convert_custom_config: ConvertCustomConfig | None = field(repr=False)
    _model: nn.Module = field(repr=False)
    _parts: tuple[Part, ...] = field(repr=False)
    _architecture: Architecture = field(repr=False)
    _inputs: Inputs = field(repr=False)
    _source: nn.Module = field(repr=False)
    unjudged: tuple[str, ...] = ()
    _unproven: Inventory | None = field(default=None, repr=False)
    _identity: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)

    @neutral
    def prepare(self) -> nn.Module:
        """A copy of the model with observers inserted; it shares no tensors with the original.

        With ``phase = "qat"`` these are fake-quants, and the copy is in training mode.

        Raises ``PlanError`` (QR306) if torch fails, or if the copy would compute something else
        than the caller's model.
        """
        prepared = self._whole({part.path: part.prepare() for part in self._parts})
        own_tensors(prepared)
        return prepared.train(self.recipe.phase == "qat")

    def _calibrated(
        self, batches: Iterable[Any], forward: Forward | None, progress: Progress | bool | None
    ) -> nn.Module:
        """The model prepared and calibrated, right after it was compiled."""
        try:
            prepared = self._prepared()
        except PlanError:
            self._prove({})  # the fused graph may be to blame
            raise
        calibrate_checking(prepared, batches, forward, progress, self._prove)
        return prepared

    def _prove(self, samples: Mapping[str, Sample]) -> None:
        """Prove what was not yet proven, by calls of the prepared parts where there are any."""
        if self._unproven is not None:
            calls = {path: Example(each.inputs, each.output) for path, each in samples.items()}
            prove_by_call(self._unproven, calls)

    def _prepared(self) -> nn.Module:
        """As `prepare`, but right after the model was compiled, and sharing tensors with it."""
        return self._whole({part.path: part.prepare_at_once() for part in self._parts})

    def _whole(self, parts: Mapping[str, nn.Module]) -> nn.Module:
        prepared = with_parts(self._model, parts, self.recipe.fx.preserved_attributes)
        paths = [part.path for part in self._parts]
        is_traced = isinstance(prepared, fx.GraphModule)
        given = given_names(self._model, self._inputs) if is_traced else ()
        mark_prepared(prepared, self.recipe, self._identity, paths, given)
        if all(finding.code != "QR237" for finding in self.plan.warnings):
            prepared_state(prepared).sums = int8_sums(self.plan)
        return prepared

    @neutral
    def convert(self, prepared: nn.Module) -> nn.Module:
        """The quantized model, audited; ``prepared`` stays usable.

        Raises:
            AuditError: the converted model is not what the plan says.
            CalibrationError: the plan has static sites and ``prepared`` was never calibrated, or
                an observer fails (QR404).
            ExecutionError: torch could not convert it.
            UnsupportedError: this torch or CPU lacks the backend's engine.
        """
        samples = self._samples(prepared)
        if self.recipe.phase == "qat":
            check_trained(list(traced_parts(prepared).values()))
        if self.unjudged:
            warn(unjudged_finding(self.unjudged), self.recipe.lint.ignore)
        # calibration does not change the code around the roots; training may
        around = prepared if self.recipe.phase == "qat" else self._model
        with failing_observers_named():
            parts = {
                part.path: part.convert(
                    prepared.get_submodule(part.path), samples.get(part.path), self.recipe.lint
                )
                for part in self._parts
            }
        converted = with_parts(around, parts, self.recipe.fx.preserved_attributes)
        converted.eval()  # conversion creates modules in training mode
        if self.recipe.fx.roots:
            self._check_around(around, converted, prepared_state(prepared))
        self._check_batch_size(converted, prepared_state(prepared))
        forget_calls(converted, self.plan)
        own_tensors(converted)
        forget_preparation(converted)
        attach(converted, origin_of(self), self._architecture)
        return converted

    def _reference(self, prepared: nn.Module) -> nn.Module:
        """The reference conversion of what was calibrated."""
        references = {
            part.path: part.reference(prepared.get_submodule(part.path)) for part in self._parts
        }
        preserved = self.recipe.fx.preserved_attributes
        return with_parts(self._model, references, preserved).eval()

    @property
    def example_inputs(self) -> Inputs:
        """The inputs of the whole model."""
        return self._inputs

    def _check_around(self, before: nn.Module, converted: nn.Module, state: PreparedState) -> None:
        roots = [part.path for part in self._parts]
        with engine_of(self.plan):
            inputs = state.whole or self._inputs
            ignore = self.recipe.lint.ignore
            around = around_findings(before, converted, roots, inputs)
            settle([*around, *dtype_findings(converted, state.samples)], ignore)
            settle(call_findings(converted, state.samples, state.later_calls), ignore)

    def _check_batch_size(self, converted: nn.Module, state: PreparedState) -> None:
        sample = state.samples.get("")
        inputs = state.whole or (self._inputs if sample is None else sample.inputs)
        # training has changed what the output was before
        output = None if sample is None or self.recipe.phase == "qat" else sample.output
        with engine_of(self.plan):
            found = size_findings(self._source, converted, self._parts, inputs, output)
            settle(found, self.recipe.lint.ignore)

    def _samples(self, prepared: nn.Module) -> Mapping[str, Sample]:
        state = prepared_state(prepared)
        if state.origin != self._identity:
            raise CalibrationError.of(
                "QR406",
                "this model was prepared by another CompiledRecipe",
                hint="convert with the CompiledRecipe that prepared it",
            )
        needs_batches = self.recipe.phase == "ptq" and any(
            site.mode == "static" for site in self.plan.sites
        )
        if not state.samples and needs_batches:
            # a state_dict may have brought ranges
            check_calibrated(list(traced_parts(prepared).values()))
        return state.samples


def origin_of(compiled: CompiledRecipe) -> Provenance:
    """Where a model comes from that is converted now."""
    return make_provenance(compiled.recipe, compiled.plan, compiled.unjudged)


def exportable(compiled: CompiledRecipe, prepared: nn.Module) -> Exportable:
    """The quantized model for exporters, audited; see `qrecipe.export_onnx`.

    Raises ``ArtifactError`` (QR512) for a model that cannot be exported, and whatever
    `CompiledRecipe.convert` raises.
    """
    compiled._samples(prepared)
    with failing_observers_named():
        parts = {
            part.path: part.exportable(prepared.get_submodule(part.path))
            for part in compiled._parts
        }
    if "" in parts:
        return parts[""]
    is_trained = compiled.recipe.phase == "qat"
    around = prepared if is_trained else compiled._model
    return joined(around, parts, compiled._inputs, compiled._source if not is_trained else None)


@neutral
def plan(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    example_inputs: Any,
    *,
    executor: Executor | None = None,
) -> Plan:
    """Decide what the recipe does to each operation of the model, without changing anything.

    ``recipe`` is a `Recipe`, a path or a reference; ``example_inputs`` is one batch: a tensor, a
    tuple or list of positional inputs, or a mapping of keyword inputs. ``executor`` overrides the
    executor of the recipe; without either, it depends on whether the model can be traced.

    Raises:
        RecipeError: the recipe is invalid.
        PlanError: recipe and model do not fit, or the model cannot be traced; ``error.plan`` is
            the complete plan if one could be made.
    """
    loaded = executed_by(load_recipe(recipe), executor)
    made = decide(model, loaded, Inputs.from_batch(example_inputs))
    warn_of_missed(made, loaded)
    return made


@neutral
def compile(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    example_inputs: Any,
    *,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    target_cpu: TargetCpu = "this",
    executor: Executor | None = None,
) -> CompiledRecipe:
    """Plan the recipe for the model, and put the plan into a graph for FX to execute.

    Arguments and errors as for `plan`. ``batches`` and ``forward``, as in `calibrate`, are only
    used for the recipe's ``[transform]`` table, unless `transform` has made the model. A plan that
    needs a CPU with VNNI is an ``UnsupportedError`` (QR318) on a CPU without it, unless
    ``target_cpu`` is ``"vnni"``: then the model is made for such a CPU, and checked as far as this
    CPU can.
    """
    loaded = executed_by(load_recipe(recipe), executor)
    transformed = ready(model, loaded, batches, forward)
    return _compile(transformed, loaded, Inputs.from_batch(example_inputs), target_cpu)


def _compile(
    model: nn.Module, recipe: Recipe, inputs: Inputs, target_cpu: TargetCpu
) -> CompiledRecipe:
    compiled = compile_decided(model, recipe, inputs, target_cpu)
    warn_of_missed(compiled.plan, recipe)
    return compiled


@neutral
@ranks.together
def quantize(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
    target_cpu: TargetCpu = "this",
    executor: Executor | None = None,
) -> nn.Module:
    """Plan, compile, prepare, calibrate, convert and audit in one call.

    ``batches`` is as in `calibrate`, and required if the plan has static sites; ``example_inputs``
    default to the first batch; ``target_cpu`` is as for `compile`, ``executor`` as for `plan`. The
    caller's model is not changed.

    In an initialized process group of torch.distributed, all ranks call it, as for `calibrate`, and
    get the same model. Example inputs default to the first batch of the first rank that has one.

    Raises what `plan`, `calibrate` and `CompiledRecipe.convert` raise.
    """
    loaded = executed_by(load_recipe(recipe), executor)
    check_same("quantize", loaded.fingerprint, model)
    if loaded.phase == "qat":
        raise PlanError(_qat_finding())
    if batches is None:
        if example_inputs is None:
            raise _no_batches("neither batches nor example_inputs are given")
        transformed = ready(model, loaded, None)
        compiled = _compile(transformed, loaded, Inputs.from_batch(example_inputs), target_cpu)
        if any(site.mode == "static" for site in compiled.plan.sites):
            raise _no_batches(
                "static quantization needs batches to calibrate with, but none are given"
            )
        return compiled.convert(compiled._prepared())
    model, batches = _transformed(model, loaded, batches, forward, progress)
    first, stream = first_of_all(batches)
    if example_inputs is None:
        compiled = _compile_for_batch(model, loaded, first, forward, target_cpu)
    else:
        compiled = _compile(model, loaded, Inputs.from_batch(example_inputs), target_cpu)
    return compiled.convert(compiled._calibrated(stream, forward, progress))


def simulate(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
    target_cpu: TargetCpu = "this",
) -> nn.Module:
    """The model of `quantize` as it computes on its target CPU.

    If this CPU cannot check the kernels, it is torch's reference model, which computes in float
    what they compute in integers. Arguments and errors as for `quantize`.
    """
    model, batches = _transformed(model, recipe, batches, forward, progress)
    first, stream = first_of_all(batches)
    compiled = _compile_for_batch(model, recipe, first, forward, target_cpu)
    prepared = compiled._calibrated(stream, forward, progress)
    converted = compiled.convert(prepared)
    return compiled._reference(prepared) if compiled.unjudged else converted


def _transformed(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    forward: Forward | None,
    progress: Progress | bool | None,
) -> tuple[nn.Module, Iterable[Any]]:
    """The model that the recipe quantizes, and batches to calibrate it with."""
    if recipe.transform.changes:
        batches = rereadable(batches, ranks.share(recipe.calibration.max_batches))
    return ready(model, recipe, batches, forward, progress), batches


def _compile_for_batch(
    model: nn.Module, recipe: Recipe, batch: Any, forward: Forward | None, target_cpu: TargetCpu
) -> CompiledRecipe:
    """Compile for a batch that calibration begins with: its run proves the fused graph."""
    with inputs_of_batch(model, batch, forward) as inputs:
        if recipe.fx.roots or ranks.count() > 1:  # not every rank runs this batch
            return _compile(model, recipe, inputs, target_cpu)
        inventory = unproven_inventory_of(model, recipe, inputs)
        compiled = _compiled(model, inventory, recipe, inputs, target_cpu)
        warn_of_missed(compiled.plan, recipe)
        return replace(compiled, _unproven=inventory)


def compile_decided(
    model: nn.Module, recipe: Recipe, inputs: Inputs, target_cpu: TargetCpu
) -> CompiledRecipe:
    """As `compile`, but without the warnings of the plan."""
    return _compiled(model, inventory_of(model, recipe, inputs), recipe, inputs, target_cpu)


def _compiled(
    model: nn.Module, inventory: Inventory, recipe: Recipe, inputs: Inputs, target_cpu: TargetCpu
) -> CompiledRecipe:
    decided = plan_of(inventory, recipe, inputs)
    if not decided.is_for_export:
        check_engine(recipe.backend)  # before calibration or training
    unjudged = unjudged_sites(decided, target_cpu)
    architecture = Architecture(
        parts=tuple(part.traced for part in inventory.parts),
        modules=recorded_modules(model, inventory.model, inventory.opened),
        opened=inventory.opened,
    )
    task = Task(inventory.model, recipe, inventory, decided, inputs, unjudged)
    made = executor_of(decided.executor).compile(task)
    around_roots = made.graph_module if recipe.fx.roots else None
    return CompiledRecipe(
        decided,
        recipe,
        made.graph_module,
        made.qconfig_mapping,
        made.backend_config,
        made.prepare_custom_config,
        made.convert_custom_config,
        inventory.model if around_roots is None else around_roots,
        made.parts,
        architecture,
        inputs,
        model,
        unjudged,
    )


def _no_batches(why: str) -> CalibrationError:
    return CalibrationError.of(
        "QR401",
        why,
        hint="pass batches=, about 100 representative mini-batches of inputs",
    )


def _qat_finding() -> Finding:
    return Finding(
        "QR308",
        'phase = "qat" needs training between prepare and convert',
        hint='one recipe serves both: set phase = "ptq" to quantize without training',
        notes=(
            "compiled = qrecipe.compile(model, recipe, example_inputs)",
            "prepared = compiled.prepare()",
            "...  # your training loop",
            "converted = compiled.convert(prepared)",
        ),
    )
