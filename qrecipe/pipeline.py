"""The steps behind one another: plan, compile, prepare, calibrate, convert, audit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_fx import (
    BackendConfig,
    ConvertCustomConfig,
    PrepareCustomConfig,
    QConfigMapping,
)
from qrecipe.backend import backend_config
from qrecipe.calibration import (
    FINGERPRINT_KEY,
    LINT_KEY,
    SAMPLE_KEY,
    TABLE_KEY,
    Forward,
    batch_inputs,
    calibrate,
    check_prepared,
    peek,
    unusable_batch,
)
from qrecipe.errors import CalibrationError, Finding, PlanError, did_you_mean
from qrecipe.fx import execution
from qrecipe.fx.audit import audit
from qrecipe.fx.emission import Emission, emit
from qrecipe.fx.numerics import Sample, run_reference
from qrecipe.inputs import Inputs
from qrecipe.inventory import Inventory, take_inventory
from qrecipe.lineage import attach, make_provenance
from qrecipe.linting import warn
from qrecipe.planning import Plan, make_plan
from qrecipe.progress import Progress
from qrecipe.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class CompiledRecipe:
    """A recipe that has been decided for one model, ready to be executed.

    ``qconfig_mapping`` is the very mapping that is executed. It is keyed by the module paths and
    scopes of ``graph_module`` and is not for ``prepare_fx`` on a model of your own.
    """

    plan: Plan
    recipe: Recipe
    graph_module: fx.GraphModule
    backend_config: BackendConfig
    prepare_custom_config: PrepareCustomConfig
    convert_custom_config: ConvertCustomConfig
    _emission: Emission
    _preserved: Mapping[str, Any]
    _inputs: Inputs

    @property
    def qconfig_mapping(self) -> QConfigMapping:
        return self._emission.qconfig_mapping

    def prepare(self) -> fx.GraphModule:
        """The model with observers inserted, on a copy.

        Raises ``PlanError`` (QR308) for a recipe with ``phase = "qat"``.
        """
        if self.recipe.phase == "qat":
            raise PlanError(_qat_finding(), self.plan)
        prepared = execution.prepared_copy(
            self.graph_module,
            self._emission,
            self.backend_config,
            self.prepare_custom_config,
            self._preserved,
        )
        prepared.meta[TABLE_KEY] = self.recipe.calibration
        prepared.meta[LINT_KEY] = self.recipe.lint
        prepared.meta[FINGERPRINT_KEY] = self.recipe.fingerprint
        return prepared

    def convert(self, prepared: fx.GraphModule) -> fx.GraphModule:
        """The quantized model, audited; ``prepared`` stays usable.

        Raises:
            AuditError: the converted model is not what the plan says.
            CalibrationError: the plan has static sites and ``prepared`` was never calibrated.
            ExecutionError: torch could not convert it.
            UnsupportedError: this torch or CPU lacks the backend's engine.
        """
        self._check_prepared(prepared)
        sample = prepared.meta.get(SAMPLE_KEY)
        if sample is None:
            if any(site.mode == "static" for site in self.plan.sites):
                raise CalibrationError(
                    Finding(
                        "QR401",
                        "the prepared model was never calibrated",
                        hint="run qrecipe.calibrate(prepared, batches) first",
                    )
                )
            sample = self._float_sample(prepared)

        def make_reference() -> fx.GraphModule:
            return execution.reference(prepared, self.backend_config, self.convert_custom_config)

        reference = make_reference()
        proof = run_reference(reference, sample)
        # in place: a second reference is needed only where a kernel is suspected
        converted = execution.lowered(
            reference, prepared, self.recipe.backend, self.convert_custom_config
        )
        with execution.engine(self.recipe.backend):
            audit(self.plan, converted, proof, make_reference, self.recipe.lint)
        attach(converted, make_provenance(self.recipe, self.plan))
        return converted

    def _check_prepared(self, prepared: fx.GraphModule) -> None:
        check_prepared(prepared)
        if prepared.meta[FINGERPRINT_KEY] != self.recipe.fingerprint:
            raise CalibrationError(
                Finding(
                    "QR406",
                    "this model was prepared by another recipe",
                    hint="convert with the CompiledRecipe that prepared it",
                )
            )

    def _float_sample(self, prepared: fx.GraphModule) -> Sample:
        with torch.no_grad():
            return Sample(self._inputs, self._inputs.call(prepared))


def plan(model: nn.Module, recipe: Recipe | str, example_inputs: Any) -> Plan:
    """What the recipe does to each operation of the model; nothing is executed or changed.

    ``recipe`` is a `Recipe`, a path or a reference; ``example_inputs`` is one batch: a tensor, a
    tuple or list of positional inputs, or a dict of keyword inputs.

    Raises:
        RecipeError: the recipe is at fault.
        PlanError: recipe and model do not fit, or the model cannot be traced; ``error.plan`` is
            the complete plan where one could be made.
    """
    loaded = load_recipe(recipe)
    return make_plan(_inventory(model, loaded, Inputs.from_batch(example_inputs)), loaded)


def compile(model: nn.Module, recipe: Recipe | str, example_inputs: Any) -> CompiledRecipe:
    """Plan the recipe for the model and put the plan into a graph that FX will execute.

    Arguments and errors as for `plan`.
    """
    return _compile(model, load_recipe(recipe), Inputs.from_batch(example_inputs))


def quantize(
    model: nn.Module,
    recipe: Recipe | str,
    batches: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> fx.GraphModule:
    """Plan, compile, prepare, calibrate, convert and audit in one call.

    ``batches`` is what `calibrate` takes, needed where the plan has static sites;
    ``example_inputs`` are taken from the first batch where they are not given. The caller's model
    stays as it is.

    Raises what `plan`, `calibrate` and `CompiledRecipe.convert` raise.
    """
    loaded = load_recipe(recipe)
    if loaded.phase == "qat":
        raise PlanError(_qat_finding())
    if batches is None:
        if example_inputs is None:
            raise _no_batches()
        compiled = _compile(model, loaded, Inputs.from_batch(example_inputs))
        if any(site.mode == "static" for site in compiled.plan.sites):
            raise _no_batches()
        return compiled.convert(compiled.prepare())
    first, stream = peek(batches)
    if example_inputs is None:
        compiled = _compile_for_batch(model, loaded, first, forward)
    else:
        compiled = _compile(model, loaded, Inputs.from_batch(example_inputs))
    prepared = compiled.prepare()
    calibrate(prepared, stream, forward, progress)
    return compiled.convert(prepared)


def _compile_for_batch(
    model: nn.Module, recipe: Recipe, batch: Any, forward: Forward | None
) -> CompiledRecipe:
    inputs = batch_inputs(model, batch, forward)
    try:
        return _compile(model, recipe, inputs)
    except PlanError as error:
        if [finding.code for finding in error.findings] != ["QR307"]:
            raise
        raise unusable_batch(batch, 0, error.findings[0].message) from error


def _compile(model: nn.Module, recipe: Recipe, inputs: Inputs) -> CompiledRecipe:
    inventory = _inventory(model, recipe, inputs)
    decided = make_plan(inventory, recipe)
    preserved = _preserved_attributes(model, recipe.fx.preserved_attributes)
    names = list(preserved)
    return CompiledRecipe(
        plan=decided,
        recipe=recipe,
        graph_module=inventory.graph_module,
        backend_config=backend_config(recipe.backend),
        prepare_custom_config=PrepareCustomConfig().set_preserved_attributes(names),
        convert_custom_config=ConvertCustomConfig().set_preserved_attributes(names),
        _emission=emit(decided, inventory.graph_module),
        _preserved=preserved,
        _inputs=inputs,
    )


def _inventory(model: nn.Module, recipe: Recipe, inputs: Inputs) -> Inventory:
    _check_model(model, recipe)
    return take_inventory(model, inputs, recipe.fx, backend_config(recipe.backend))


def _check_model(model: nn.Module, recipe: Recipe) -> None:
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise PlanError(
            Finding(
                "QR306",
                f"the model is {'the class ' if isinstance(model, type) else 'a '}{kind}, "
                "not a torch.nn.Module",
                hint="pass an instance of the model",
            )
        )
    findings = list(_model_findings(model, recipe))
    if findings:
        raise PlanError(findings)
    if model.training:
        warn(
            Finding(
                "QR202",
                "the model is in training mode; its copy is quantized in eval mode",
                hint="call model.eval() first, so that what you compare with is the same",
            ),
            recipe.lint,
        )


def _model_findings(model: nn.Module, recipe: Recipe) -> Iterator[Finding]:
    if recipe.fx.roots:
        yield Finding(
            "QR306",
            "fx.roots is not executed by this version",
            recipe.origin("fx.roots"),
            hint="remove the key to quantize the whole model",
        )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            yield Finding(
                "QR306",
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: quantization starts "
                "from a float32 model",
                hint="call model.float() on it, or on a copy of it",
            )
            return
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            yield Finding(
                "QR306",
                f"{name} is on {tensor.device}: the quantized kernels run on the CPU",
                hint='call model.to("cpu") on it, or on a copy of it',
            )
            return


def _preserved_attributes(model: nn.Module, names: list[str]) -> dict[str, Any]:
    missing = [name for name in names if not hasattr(model, name)]
    if missing:
        known = [name for name in vars(model) if not name.startswith("_")]
        raise PlanError(
            [
                Finding(
                    "QR301",
                    f'fx.preserved_attributes "{name}" is no attribute of the model',
                    hint=did_you_mean(name, known),
                )
                for name in missing
            ]
        )
    return {name: getattr(model, name) for name in names}


def _no_batches() -> CalibrationError:
    return CalibrationError(
        Finding(
            "QR401",
            "static quantization needs batches to calibrate with, and none are given",
            hint="pass batches=, about 100 representative mini-batches of inputs",
        )
    )


def _qat_finding() -> Finding:
    return Finding(
        "QR308",
        'phase = "qat" trains between prepare and convert',
        hint='one recipe serves both: set phase = "ptq" to quantize without training',
        notes=(
            "compiled = qrecipe.compile(model, recipe, example_inputs)",
            "prepared = compiled.prepare()",
            "...  # your training loop",
            "converted = compiled.convert(prepared)",
        ),
    )
