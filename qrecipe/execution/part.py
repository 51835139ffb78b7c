"""What an executor is given, and the parts that it makes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx, nn

from qrecipe._torch_fx import (
    BackendConfig,
    ConvertCustomConfig,
    PrepareCustomConfig,
    QConfigMapping,
)
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ArtifactError
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.quantized import Became
from qrecipe.model.record import Architecture
from qrecipe.planning.plan import Plan
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import FxTable, LintTable
from qrecipe.rules.resolution import listed


@dataclass(frozen=True, slots=True)
class Task:
    """A model and the plan for it.

    ``unjudged`` are the sites that may saturate on this CPU, being made for another.
    """

    model: nn.Module
    recipe: Recipe
    inventory: Inventory
    plan: Plan
    inputs: Inputs
    unjudged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A stored model that is to be made again, from a float model of the same architecture.

    ``table`` is its recipe's. ``check`` is told the model's sites before the plan is carried out,
    and raises if it is not theirs.
    """

    model: nn.Module
    plan: Plan
    architecture: Architecture
    table: FxTable
    check: Callable[[Inventory], None]


@dataclass(frozen=True, slots=True)
class Exportable:
    """A conversion that consists of plain functions, and a run of it on the example inputs.

    ``inputs`` are what its placeholders take, ``output`` is what it gives, and ``float_output``
    what the prepared model gives, or None where there is none.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Any, ...]
    output: Any
    float_output: Any


def check_exportable(plan: Plan) -> None:
    """Raises ``ArtifactError`` (QR512) if the plan has dynamic sites."""
    dynamic = [site.name for site in plan.sites if site.mode == "dynamic"]
    if dynamic:
        hint = "torch's exporter does not support dynamic quantization: make them static or float"
        text = f"dynamic sites cannot be exported: {listed(dynamic)}"
        raise ArtifactError.of("QR512", text, hint=hint)


@dataclass(frozen=True, slots=True)
class Realised:
    """What a site's nodes in a converted graph turned out to be.

    ``result`` is the node with the site's result, where ``node`` is another.
    """

    became: Became
    node: fx.Node
    result: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What in a part fixes it to one batch size, and what helps."""

    what: str
    hint: str | None


class Part(Protocol):
    """The whole model, or a root of it, on its way to quantized kernels."""

    @property
    def path(self) -> str:
        """Where it is in the model; empty for the whole model."""

    def prepare(self) -> nn.Module:
        """The part with observers or fake-quants inserted, on a copy that may share tensors.

        Raises ``PlanError`` (QR306) if it computes something other than the caller's model.
        """

    def prepare_at_once(self) -> nn.Module:
        """As `prepare`, before anybody could have changed the weights since it was compiled."""

    def convert(self, prepared: nn.Module, sample: Sample | None, lint: LintTable) -> nn.Module:
        """The quantized part, audited on ``sample``, or on the example inputs without one.

        ``prepared`` stays as it is. Raises ``ExecutionError`` (QR405) and ``AuditError``.
        """

    def reference(self, prepared: nn.Module) -> nn.Module:
        """The quantized part as it computes on a CPU where no kernel saturates."""

    def fault(self, converted: nn.Module, inputs: Inputs) -> Fault | None:
        """What in the converted part cannot compute inputs of another batch size, if it is known.

        ``inputs`` are the part's own.
        """

    def exportable(self, prepared: nn.Module) -> Exportable:
        """The quantized part for exporters, audited.

        Raises ``ArtifactError`` (QR512) if it cannot be exported, and ``AuditError``.
        """


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model that is ready to be prepared.

    ``graph_module`` is the model with a graph in place of each part, where there are graphs; the
    rest is what FX graph mode is given beside them.
    """

    parts: tuple[Part, ...]
    graph_module: nn.Module | None = None
    qconfig_mapping: QConfigMapping | None = None
    backend_config: BackendConfig | None = None
    prepare_custom_config: PrepareCustomConfig | None = None
    convert_custom_config: ConvertCustomConfig | None = None
