"""Whether a stored plan is what its recipe says about the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from qrecipe._version import __version__
from qrecipe.artifact.container import problem
from qrecipe.artifact.metadata import StoredModel
from qrecipe.errors.text import shown
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.backend import Outcome, outcomes, saturating
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.patterns import is_exact
from qrecipe.recipe.recipe import Rule
from qrecipe.recipe.schema import TransformTable
from qrecipe.rules.resolution import Decision, describe, resolve


def check_agreement(stored: StoredModel, inventory: Inventory) -> None:
    """Check that the plan has the rules and the outcomes that the recipe gives the model's sites.

    What a backend can do is only compared if the same releases of qrecipe and torch made the file.
    Raises ArtifactError (QR505).
    """
    if found := [*_contradictions(stored, inventory)]:
        what = "has a plan that contradicts its recipe"
        raise problem("QR505", stored.header.file, what, differences=found)


def _contradictions(stored: StoredModel, inventory: Inventory) -> Iterator[str]:
    plan = stored.plan
    if {verdict.rule for verdict in plan.rules} != {rule.as_written for rule in stored.rules}:
        yield "the plan lists other rules"
    yield from _other_transforms(plan, stored.recipe.transform)
    decisions = dict(resolve(inventory.structure, stored.rules).decisions)
    for site in plan:
        rule = _rule_of(site, decisions[site.name])
        if rule is None:
            says = describe(decisions[site.name].rule)
            yield f"{site.name} was decided by {describe(site.rule)}, but the recipe says {says}"
            return
        decisions[site.name] = replace(decisions[site.name], rule=rule)
    expected: Mapping[str, Outcome] = {}
    here = {"qrecipe": __version__, "torch": torch.__version__}
    if here.items() <= stored.contents.versions.items():
        expected = outcomes(inventory, decisions, plan.backend, plan.phase, plan.executor)
        if plan.needs_vnni != bool(saturating(inventory, expected, plan.backend)):
            yield "the plan does not say whether kernels saturate without VNNI"
    for site in plan:
        rule = decisions[site.name].rule
        if site.verdict == "float" and not site.reason:
            yield f"{site.name} is float without a reason"
        elif site.verdict == "quantized" and rule.qconfig is None:
            yield f"{site.name} is quantized, and {describe(rule)} leaves it float"
        elif site.name in expected and _outcome(site) != _outcome(expected[site.name]):
            found, wanted = site.verdict, expected[site.name].verdict
            said = f"{found}, not {wanted}" if found != wanted else f"{found} in another way"
            yield f"{site.name} is {said} as {describe(rule)} asks ({shown(rule.label)})"


def _other_transforms(plan: Plan, table: TransformTable) -> Iterator[str]:
    if plan.chains and table.equalize is None:
        yield "the plan has chains, and the recipe does not equalize"
    if plan.groups and table.smooth is None:
        yield "the plan has groups, and the recipe does not smooth"
    if [step.name for step in plan.steps] != list(table.plugins):
        yield "the plan lists other transforms"


def _rule_of(site: Site, decision: Decision) -> Rule | None:
    """The rule of the recipe that decided the site, if it is one that can.

    A resolved recipe does not say which of its globs came from an extended recipe and are beaten.
    """
    winner = decision.rule
    rivals = [
        rule
        for rule in decision.shadowed
        if rule.tier == winner.tier and not is_exact(rule.key) and not is_exact(winner.key)
    ]
    return next((rule for rule in (winner, *rivals) if rule.as_written == site.rule), None)


def _outcome(decided: Site | Outcome) -> tuple[object, ...]:
    return decided.verdict, decided.mode, decided.qconfig, decided.engine
