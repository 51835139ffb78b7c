"""A warning if almost nothing of what a recipe asks for is quantized."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qrecipe.errors.findings import Finding
from qrecipe.model.altered_modules import alteration
from qrecipe.model.call import FEW_SAMPLES, Inputs
from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.model.normalize import TAKES_WEIGHT
from qrecipe.model.proposals import OF_TORCH
from qrecipe.model.work import work_of, work_of_sites
from qrecipe.planning.backend import FOLLOWERS
from qrecipe.planning.plan import Plan, RuleVerdict, Site
from qrecipe.registry.builtin import canonical_module_type
from qrecipe.rules.resolution import describe, listed
from qrecipe.rules.structure import ModelStructure, enclosing

_LEAST_SHARE = 0.1
_SHOWN = 4

_ACCEPT = 'accept it: [lint] ignore = ["QR221"]'


@dataclass(frozen=True, slots=True)
class _Missed:
    """A float site that rules ask to quantize, or would ask to if they reached it."""

    name: str
    op: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.op}): {self.why}"


def coverage_findings(plan: Plan, inventory: Inventory, inputs: Inputs) -> Iterator[Finding]:
    """A warning (QR221) if no site is quantized, or less than a tenth of what rules ask for.

    This is measured in multiplications with weights: of the sites that a rule with a qconfig
    decides, and of modules that torch keeps whole although a type rule with a qconfig names what is
    inside. Nothing is expected if all rules say float.
    """
    asking = [each for each in plan.rules if not each.rule.is_float]
    if not asking:
        return
    missed = tuple(_missed(plan, inventory, asking))
    if not any(site.verdict == "quantized" for site in plan.sites):
        yield _nothing(asking, missed)
        return
    if not any(_may_multiply(inventory.matches[each.name]) for each in missed):
        return  # without running the model again
    try:
        work = _work_of(inventory, inputs, FEW_SAMPLES)
    except Exception:  # the model needs all of them
        work = _work_of(inventory, inputs, sys.maxsize)
    done = sum(work.get(site.name, 0) for site in plan.sites if site.verdict == "quantized")
    lost = sum(work.get(each.name, 0) for each in missed)
    if done < _LEAST_SHARE * (done + lost):
        share = done / (done + lost)
        message = f"only {share:.1%} of the multiplications that the rules ask for are quantized"
        yield _finding(message, sorted(missed, key=lambda each: -work.get(each.name, 0)))


def _nothing(asking: list[RuleVerdict], missed: tuple[_Missed, ...]) -> Finding:
    if missed:
        names = listed([each.name for each in missed])
        message = f"everything that the rules ask for stays float ({names})"
        return _finding(f"nothing is quantized: {message}", missed)
    rules = listed([describe(each.rule) for each in asking])
    if any(each.sites for each in asking):
        return _finding(
            f"nothing is quantized: other rules leave everything float that {rules} covers"
        )
    message = f"nothing is quantized: the model has no operation for {rules}"
    hint = f"`qrecipe suggest` writes a recipe for what the model has; or {_ACCEPT}"
    return replace(_finding(message), hint=hint)


def _finding(message: str, missed: Sequence[_Missed] = ()) -> Finding:
    return Finding("QR221", message, hint=_ACCEPT, notes=tuple(map(str, missed[:_SHOWN])))


def _missed(plan: Plan, inventory: Inventory, asking: list[RuleVerdict]) -> Iterator[_Missed]:
    wanted = {
        canonical_module_type(each.rule.key) for each in asking if each.rule.tier == "module_type"
    }
    for site in plan.sites:
        match = inventory.matches[site.name]
        operation = match.operation
        if site.verdict != "float" or operation.kind in FOLLOWERS or operation.is_inserted:
            continue
        if not site.rule.is_float:
            yield _Missed(site.name, site.op, site.reason or "float")
        elif site.rule.tier == "global":
            why = _out_of_reach(site, match, plan.structure, wanted)
            if why is not None:
                yield _Missed(site.name, site.op, why)


def _out_of_reach(
    site: Site, match: Match, structure: ModelStructure, wanted: set[str]
) -> str | None:
    """Why type rules do not reach a module although they name its base class or its contents."""
    path = site.name.partition("#")[0]
    if wanted & structure.bases.get(path, frozenset()):
        altered = None if match.module is None else alteration(match.module)
        return altered or "rules by type match exactly, and it is a subclass"
    inside = (p for p in structure.modules if path in enclosing(p)[1:])
    if any(wanted & (structure.modules[p] | structure.bases[p]) for p in inside):
        return match.whole or OF_TORCH
    return None


def _may_multiply(match: Match) -> bool:
    if match.module is not None:
        return any(parameter.dim() > 1 for parameter in match.module.parameters())
    return bool(match.operation.stored) or any(node.target in TAKES_WEIGHT for node in match.nodes)


def _work_of(inventory: Inventory, inputs: Inputs, count: int) -> Mapping[str, int]:
    """Multiplications by site, for the first samples."""
    parts = tuple(
        replace(part, inputs=part.inputs.first_samples(count)) for part in inventory.parts
    )
    is_traced = inventory.untraced is None
    places = {} if is_traced else work_of(inventory.model, inputs.first_samples(count)).places
    return work_of_sites(inventory.model, replace(inventory, parts=parts), places)
