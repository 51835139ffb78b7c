"""A starter recipe for a model, following the workflow that the literature recommends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qrecipe.authoring.suggest.description import description
from qrecipe.authoring.suggest.float_rules import MASKED, refusals, rules_of_float_sites
from qrecipe.authoring.suggest.schemes import (
    FEW_CONVOLUTIONS,
    MOST,
    Scheme,
    Subject,
    by_modules,
    in_graphs,
    in_programs,
    schemes,
    values_for,
    with_rules,
)
from qrecipe.authoring.suggest.transforms import remedies
from qrecipe.errors.findings import PlanError, QRecipeError, UnsupportedError
from qrecipe.errors.warn import warn
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.proposals import traceable_parts
from qrecipe.model.quantized import quantized_part
from qrecipe.model.work import work_of, work_of_sites
from qrecipe.pipeline import quantize
from qrecipe.planning.decide import make_plan, warn_of_missed
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.masked_sums import mask_finding
from qrecipe.planning.plan import Plan
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.overlay import fitting, float_rules
from qrecipe.recipe.recipe import Recipe, parse_recipe
from qrecipe.recipe.toml.writer import toml_text


@neutral
@ranks.alone()
def suggest(model: nn.Module, example_inputs: Any, *, num_batches: int | None = None) -> Recipe:
    """A recipe to start from: it can be planned for this model and gives its reasons.

    Static int8 for convolutional nets, dynamic if linear and recurrent layers dominate, both for a
    mixture; weight-only for embeddings. ``example_inputs`` are as in `qrecipe.plan`.
    ``num_batches`` is the number of calibration batches, if known: with fewer than 100, activations
    are observed by minimum and maximum, which don't depend on the order of the batches.

    The model is quantized with the example inputs before a recipe is suggested. If it cannot be
    traced, its roots or its single modules are quantized instead. A model with convolutions is then
    also tried as a program of torch.export, which is only suggested if the parts cover less than
    half of the work. A warning (QR207) says whether sites are slower in int8 than in float.

    Raises:
        UnsupportedError: nothing in the model has a quantized kernel as fast as float, or it is
            quantized already (QR335).
        TraceError: the model cannot be traced, and no part of it can be quantized without that.
        PlanError: the model cannot be quantized as it is, or does not accept the inputs.
    """
    return parse_recipe(suggestion(model, example_inputs, num_batches))


@neutral
@ranks.alone()
def suggestion(model: nn.Module, example_inputs: Any, num_batches: int | None = None) -> str:
    """The TOML text of the recipe that `suggest` returns. Raises as `suggest`."""
    inputs = Inputs.from_batch(example_inputs)
    if isinstance(model, nn.Module) and (quantized := quantized_part(model)) is not None:
        hint = "suggest a recipe for the float model that it was made from"
        raise UnsupportedError.of("QR335", f"this model {quantized}", hint=hint)
    case = _Case(model, inputs, num_batches)
    try:
        subject = case.subject(in_graphs())
    except PlanError as error:
        if not isinstance(model, nn.Module) or error.findings[0].code == "QR307":
            raise
        case.reasons.append(error.findings[0].message)
        program = _as_program(case)
        exported = None if program is None else _proven(case, program)
        found = _of_parts(case)
        if found is None or found.share < MOST:
            found = _better(found, exported)
        if found is None:
            raise
        return _told(found)
    planned = next(filter(None, (_settled(subject, scheme) for scheme in schemes(subject))), None)
    if planned is None:
        hint = "`qrecipe plan builtin:x86-static` shows what each operation can be, and why"
        message = "nothing in this model has a quantized kernel as fast as float"
        raise UnsupportedError.of("QR335", message, hint=hint)
    return _told(_proven(case, subject) or _of_parts(case) or planned)


@dataclass(frozen=True, slots=True)
class _Case:
    """A model and what it is called with; ``reasons`` say what was tried in vain."""

    model: nn.Module
    inputs: Inputs
    num_batches: int | None
    reasons: list[str] = field(default_factory=list)

    def subject(self, recipe: Recipe, roots: Sequence[str] = ()) -> Subject:
        """The model as a recipe takes it. Raises ``PlanError`` if it cannot."""
        inventory = inventory_of(self.model, recipe, self.inputs)
        work = work_of(inventory.model, self.inputs)
        of_sites = work_of_sites(inventory.model, inventory, work.places)
        return Subject(inventory, work, of_sites, tuple(roots), num_batches=self.num_batches)


@dataclass(frozen=True, slots=True)
class _Proposal:
    """The text of a recipe, its plan, and the share of the work that it quantizes, 0 to 1."""

    text: str
    plan: Plan
    share: float


def _told(proposal: _Proposal) -> str:
    """The text, once the warnings that matter have been issued."""
    recipe = parse_recipe(proposal.text)
    warn_of_missed(proposal.plan, recipe)
    masked = [site.name for site in proposal.plan.sites if site.rule.reason == MASKED]
    if masked:
        warn(mask_finding(masked, "the suggested recipe leaves them float"), recipe.lint.ignore)
    return proposal.text


def _of_parts(case: _Case) -> _Proposal | None:
    """The first proposal that works and covers most of the work, else the one that covers most."""
    found: list[_Proposal] = []
    for subject in _parts(case):
        proposal = _proven(case, subject)
        if proposal is None and len(subject.roots) > 1:
            proposal = _of_some_roots(case, subject)
        if proposal is not None:
            found.append(proposal)
            if proposal.share >= MOST:
                return proposal
    return _better(*found)


def _better(*proposals: _Proposal | None) -> _Proposal | None:
    """The one that covers most of the work, the first of equals."""
    return max(filter(None, proposals), key=lambda each: each.share, default=None)


def _proven(case: _Case, subject: Subject) -> _Proposal | None:
    """The first scheme with which the model is quantized; why others are not joins the reasons."""
    for scheme in schemes(subject):
        told = replace(subject, reasons=tuple(case.reasons))
        proposal = _settled(told, scheme)
        if proposal is None:
            continue
        recipe = parse_recipe(proposal.text)
        try:
            with unwarned():
                quantize(case.model, recipe, [case.inputs.batch], progress=False)
        except QRecipeError as error:
            where = f" with roots {', '.join(subject.roots)}" if subject.roots else ""
            case.reasons.append(f"{scheme}{where}: {error.findings[0].message}")
        else:
            found = tuple(remedies(case.model, case.inputs, recipe, proposal.plan))
            return _settled(replace(told, remedies=found), scheme) if found else proposal
    return None


def _of_some_roots(case: _Case, subject: Subject) -> _Proposal | None:
    """A proposal with those roots that work alone."""

    def only(roots: Sequence[str]) -> _Proposal | None:
        try:
            chosen = case.subject(in_graphs(roots), roots)
        except PlanError:
            return None
        return _proven(case, chosen)

    roots = [root for root in subject.roots if only([root]) is not None]
    return only(roots) if roots else None


def _settled(subject: Subject, scheme: Scheme) -> _Proposal | None:
    """The scheme with rules that leave float what it cannot quantize; None if that is all."""
    values = values_for(subject, scheme)
    try:
        plan, refused = _plan_and_refusals(subject.inventory, values, {})
        if not any(site.verdict == "quantized" for site in plan.sites):
            return None
        dynamic = parse_recipe(toml_text(values)).qconfigs.get("int8-dynamic")
        values = with_rules(values, rules_of_float_sites(plan, subject.inventory, refused, dynamic))
        head = {"name": f"suggested-{scheme}", "description": description(subject, scheme, plan)}
        text, recipe = fitting(toml_text, {"format": 1, **head, **values})
        suggested = make_plan(subject.inventory, recipe)  # only suggest what can be planned
    except UnsupportedError:
        return None
    return _Proposal(text, suggested, subject.covered(plan))


def _plan_and_refusals(
    inventory: Inventory, values: Mapping[str, Any], refused: Mapping[str, str]
) -> tuple[Plan, dict[str, str]]:
    """A plan without errors, and the sites that had to be left float for it, with reasons."""
    _, recipe = fitting(toml_text, with_rules(values, float_rules(refused)["rules"]))
    try:
        plan = make_plan(inventory, recipe)
        more = refusals(plan, inventory, refused)
    except UnsupportedError as error:
        if error.plan is None:
            raise
        plan, more = error.plan, refusals(error.plan, inventory, refused)
        if not more:
            raise
    if not more:
        return plan, dict(refused)
    return _plan_and_refusals(inventory, values, {**refused, **more})


def _parts(case: _Case) -> Iterator[Subject]:
    """What is left of a model that cannot be taken as a whole, the better first."""
    try:
        work = work_of(case.model, case.inputs)
    except PlanError:  # it does not run at all
        return
    by_convolutions = work.convolution_share >= FEW_CONVOLUTIONS
    for traced in (by_convolutions, not by_convolutions):
        with suppress(PlanError):
            if not traced:
                yield case.subject(by_modules())
            elif roots := traceable_parts(case.model, case.inputs):
                yield case.subject(in_graphs(roots), roots)


def _as_program(case: _Case) -> Subject | None:
    """The model as a program of torch.export, if it can be one and has enough convolutions."""
    try:
        if work_of(case.model, case.inputs).convolution_share < FEW_CONVOLUTIONS:
            return None
        return replace(case.subject(in_programs()), executor="pt2e")
    except PlanError:
        return None
