"""The plan: the verdict for every site and every rule, before anything is quantized.

Nothing here imports torch: the plan of a stored model can be read without it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from qrecipe.errors.findings import Finding, Location
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import printable
from qrecipe.planning.plan_values import plan_of_json, plan_values, text_of_values
from qrecipe.planning.text import (
    explanation,
    plan_sections,
    rule_table,
    rules_that_matter,
    site_named,
    summary,
)
from qrecipe.recipe.recipe import Ingredient, QConfigSpec, WrittenRule
from qrecipe.recipe.schema import Backend, Executor, Phase, TensorSpec
from qrecipe.rules.structure import NO_STRUCTURE, Mode, ModelStructure
from qrecipe.terminal.report import Report, Section, report_text

Engine = Literal["fbgemm", "onednn"]
"""An engine that a single site's weights can be packed for."""

Limits = tuple[float | None, float | None]
"""The least and the greatest number, None for no limit."""

Verdict = Literal["quantized", "passthrough", "float"]
RuleOutcome = Literal["applied", "shadowed", "unused", "unmatched", "unsupported"]

EXPORTED: frozenset[Backend] = frozenset({"executorch", "tensorrt"})
"""Backends without kernels in torch: their models are handed on in torch's reference form."""


@dataclass(frozen=True, slots=True, repr=False)
class Site(ShortRepr):
    """An operation with its decision.

    ``qconfig`` is what is executed (None for float); ``input`` the spec that a float input of the
    site gets, None if it arrives quantized or the site is float; ``rule`` decided, ``shadowed``
    rules would have decided without it; ``reason`` says why a site stays float or what was
    substituted; ``engine`` is the engine that its weights are packed for, if not the backend's;
    ``clamp`` has the limits between which its result is observed, if only clamps read it.
    ``reads`` are the tensors that it computes with: names of sites, ``input "x"``,
    ``parameter "w"``; ``is_output`` means that the model returns its result.
    """

    name: str
    op: str
    members: tuple[str, ...]
    qconfig: QConfigSpec | None
    input: TensorSpec | None
    mode: Mode | None
    rule: WrittenRule
    shadowed: tuple[WrittenRule, ...]
    verdict: Verdict
    reason: str | None
    engine: Engine | None = None
    clamp: Limits | None = None
    reads: tuple[str, ...] = ()
    is_output: bool = False

    @property
    def modules(self) -> frozenset[str]:
        """The paths of its members, without the numbers of calls."""
        return frozenset(member.partition("#")[0] for member in self.members)

    @property
    def gives_integers(self) -> bool:
        """Whether its result is rounded to a static range."""
        return self.mode == "static" and self.qconfig is not None and self.qconfig.rounds_results

    @property
    def dtypes(self) -> str:
        """The dtypes of weight and activation in short: ``int8/uint8``, ``-/uint8``, ``float``."""
        if self.qconfig is None:
            return "float"
        specs = (self.qconfig.weight, self.qconfig.activation)
        text = "/".join("-" if spec is None else str(spec.dtype) for spec in specs)
        return f"{text} dynamic" if self.mode == "dynamic" else text


@dataclass(frozen=True, slots=True, repr=False)
class Chain(ShortRepr):
    """Sites that pass channels to one another, so that one can scale what the next undoes.

    ``end`` says why the chain ends. ``exponents`` has the exponent of a power of two for each
    channel between two sites, by which the first divides and the second multiplies; it is empty
    until the model has been transformed.
    """

    sites: tuple[str, ...]
    end: str
    exponents: tuple[tuple[int, ...], ...] = ()


Place = Literal["folded", "product", "none"]
"""Where a group's tensor is divided: by the site that computes it, by a product, or nowhere."""


@dataclass(frozen=True, slots=True, repr=False)
class Group(ShortRepr):
    """Linear layers that read the same tensor, whose channels they scale.

    The tensor is divided where the ``place`` says: in the weights of the site ``at`` that gives it
    (folded), or by a product of its own in float. ``reason`` says why it is not folded, or why the
    layers stay as they are. ``exponents`` has a power of two for each channel, by which the tensor
    is divided and the weights of ``sites`` are multiplied; without a difference between channels
    there is no product. They and ``alpha`` are unknown until the model has been transformed.
    """

    sites: tuple[str, ...]
    place: Place
    at: str | None = None
    reason: str = ""
    alpha: float | None = None
    exponents: tuple[int, ...] = ()

    @property
    def is_product(self) -> bool:
        """Whether a product has been put before the layers."""
        return self.place == "product" and any(self.exponents)


@dataclass(frozen=True, slots=True, repr=False)
class Step(ShortRepr):
    """A transform of a plugin.

    ``tolerance`` is how far it may change an output of the float model, relative to the largest
    one; 0 means not even the last bit. ``changed`` are the modules whose tensors it has changed,
    ``moved`` the sites whose results it has changed by more than the tolerance; both are unknown
    until the model has been transformed.
    """

    name: str
    tolerance: float
    changed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class RuleVerdict(ShortRepr):
    """What a rule did; ``sites`` are those it covers, whether or not it wins there."""

    rule: WrittenRule
    verdict: RuleOutcome
    sites: tuple[str, ...]

    @property
    def location(self) -> Location:
        """Where the rule is written."""
        return self.rule.location


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Report):
    """Recipe x model: every site's decision and every rule's verdict.

    A plan is a collection of its sites: ``len(plan)``, ``for site in plan``, ``"conv1" in plan``,
    ``plan["conv1"]``.

    ``findings`` are errors that make the plan impossible; a plan that was returned has none.
    ``warnings`` are about things that are legal but doubtful; ``boundaries`` counts the tensors
    that are quantized or dequantized at run time; ``executor_reason`` says why ``executor`` was
    chosen, None if that was not stored; ``ingredients`` are the files that the recipe is made of;
    ``chains`` are what ``[transform.equalize]`` scales, ``groups`` what ``[transform.smooth]``
    scales, ``steps`` the transforms of plugins; ``needs_vnni`` says whether kernels saturate on an
    x86 CPU without VNNI, and ``saturating`` at which sites. A plan that was read back has neither
    ``saturating`` nor ``structure``, the structure of the model.
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
    needs_vnni: bool
    ingredients: tuple[Ingredient, ...]
    executor_reason: str | None = None
    chains: tuple[Chain, ...] = ()
    groups: tuple[Group, ...] = ()
    steps: tuple[Step, ...] = ()
    structure: ModelStructure = field(default=NO_STRUCTURE, compare=False)
    saturating: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        It equals the plan that was written. JSON does not contain ``structure``, ``saturating``,
        and the text of the line that a rule is written in. So the plan does not know other names of
        a module, or modules in which nothing is called.

        Raises ``PlanError`` (QR315) for any other text.
        """
        return plan_of_json(_adapter(), text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave; otherwise as `from_json`."""
        return plan_of_json(_adapter(), text_of_values(values))

    @property
    def members(self) -> frozenset[str]:
        """All calls that its sites consist of."""
        return frozenset(member for site in self.sites for member in site.members)

    @property
    def engines(self) -> dict[str, Engine]:
        """The sites whose weights are packed for another engine than the backend's."""
        return {site.name: site.engine for site in self.sites if site.engine is not None}

    @property
    def clamps(self) -> dict[str, Limits]:
        """The sites whose results are observed between limits."""
        return {site.name: site.clamp for site in self.sites if site.clamp is not None}

    @property
    def is_for_export(self) -> bool:
        """Whether conversion gives torch's reference model, to be exported and not executed."""
        return self.backend in EXPORTED

    def _sections(self) -> Iterator[Section]:
        return plan_sections(self, rules_that_matter(self))

    def __repr__(self) -> str:
        return f"<Plan: {summary(self)}>"

    def __len__(self) -> int:
        return len(self.sites)

    def __bool__(self) -> bool:
        return True  # a plan without sites is a plan

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, item: object) -> bool:
        return item in self.sites or any(item in site.members for site in self.sites)

    def __getitem__(self, name: str) -> Site:
        """The site of that name, or the one that it is a member of.

        Raises ``PlanError`` (QR310), which is a ``KeyError`` too, for any other name.
        """
        return site_named(self, name)

    def restricted_to(self, names: Collection[str]) -> Plan:
        """The same plan for some of its sites."""
        saturating = tuple(name for name in self.saturating if name in names)
        return replace(
            self,
            sites=tuple(site for site in self.sites if site.name in names),
            needs_vnni=bool(saturating),
            saturating=saturating,
        )

    def with_all_rules(self) -> str:
        """The plan as ``str`` shows it, with the rules of shipped recipes that are unused here."""
        return report_text(plan_sections(self, rule_table(self.rules)))

    def explain(self, name: str) -> str:
        """Why a site, a member of a group, or everything in a module is decided as it is.

        Raises ``PlanError`` (QR310) for a name that the model does not have.
        """
        return printable(explanation(self, name))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: dicts, lists, strings and numbers."""
        return plan_values(self)

    def to_json(self) -> str:
        """`to_dict` as JSON, with keys in a stable order."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)
