"""The plan: what becomes of every site and of every rule, before a tensor moves."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from qrecipe.errors.findings import Finding, Location
from qrecipe.model.kernel_types import Mode
from qrecipe.planning.backend import EXPORTED, Verdict
from qrecipe.planning.engines import Engine
from qrecipe.planning.text import explanation, plan_json, plan_text
from qrecipe.recipe.recipe import Ingredient, QConfigSpec, Rule
from qrecipe.recipe.schema import Backend, Phase, TensorSpec
from qrecipe.rules.structure import ModelStructure

Executor = Literal["fx", "eager"]
"""How a plan is executed: in FX graph mode, or module by module where that cannot trace."""

RuleOutcome = Literal["applied", "shadowed", "unused", "unmatched", "unsupported"]


@dataclass(frozen=True, slots=True)
class Site:
    """An operation with its decision.

    ``qconfig`` is what is executed (None for float); ``input`` the spec that a float input of the
    site gets, None where it arrives quantized or the site is float; ``rule`` decided, ``shadowed``
    would have decided without it; ``reason`` says why a site stays float or what was substituted;
    ``engine`` packs its weights for another engine than the backend's.
    """

    name: str
    op: str
    members: tuple[str, ...]
    qconfig: QConfigSpec | None
    input: TensorSpec | None
    mode: Mode | None
    rule: Rule
    shadowed: tuple[Rule, ...]
    verdict: Verdict
    reason: str | None
    engine: Engine | None = None

    @property
    def dtypes(self) -> str:
        """The dtypes of weight and activation in short: ``int8/uint8``, ``-/uint8``, ``float``."""
        if self.qconfig is None:
            return "float"
        specs = (self.qconfig.weight, self.qconfig.activation)
        text = "/".join("-" if spec is None else str(spec.dtype) for spec in specs)
        return f"{text} dynamic" if self.mode == "dynamic" else text


@dataclass(frozen=True, slots=True)
class RuleVerdict:
    """What became of a rule; ``sites`` are those it covers, whether or not it wins there."""

    rule: Rule
    location: Location
    verdict: RuleOutcome
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Recipe x model: every site's decision and every rule's verdict.

    ``findings`` are what makes the plan impossible; a plan that was returned has none.
    ``warnings`` are legal but doubtful; ``boundaries`` counts the tensors that are quantized or
    dequantized at run time; ``ingredients`` are the files that the recipe is made of;
    ``saturating`` are the sites that read more than 7 bits, whose kernels need VNNI.
    """

    sites: tuple[Site, ...]
    rules: tuple[RuleVerdict, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    boundaries: int
    recipe: str
    fingerprint: str
    backend: Backend
    phase: Phase
    executor: Executor
    ingredients: tuple[Ingredient, ...]
    structure: ModelStructure = field(repr=False, compare=False)
    saturating: tuple[str, ...] = ()

    @property
    def needs_vnni(self) -> bool:
        """Whether kernels saturate on an x86 CPU without VNNI: those of ``saturating``."""
        return bool(self.saturating)

    @property
    def engines(self) -> dict[str, Engine]:
        """The sites whose weights are packed for another engine than the backend's."""
        return {site.name: site.engine for site in self.sites if site.engine is not None}

    @property
    def is_for_export(self) -> bool:
        """Whether conversion gives torch's reference model, to be exported and not executed."""
        return self.backend in EXPORTED

    def __str__(self) -> str:
        return plan_text(self)

    def restricted_to(self, names: Collection[str]) -> Plan:
        """The same plan for some of its sites."""
        return replace(
            self,
            sites=tuple(site for site in self.sites if site.name in names),
            saturating=tuple(name for name in self.saturating if name in names),
        )

    def explain(self, name: str) -> str:
        """Why a site, a member of a group, or everything in a module is decided as it is.

        Raises ``PlanError`` (QR310) for a name that the model does not have.
        """
        return explanation(self, name)

    def to_json(self) -> str:
        """The plan as JSON: stable keys and order, equal plans give equal text."""
        return json.dumps(plan_json(self), indent=2, sort_keys=True)
