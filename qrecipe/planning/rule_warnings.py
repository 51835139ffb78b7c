"""Warnings about rules that decide nothing, or less than they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qrecipe.errors.findings import Finding
from qrecipe.planning.backend import mode_of
from qrecipe.planning.plan import Site
from qrecipe.recipe.recipe import Recipe, Rule
from qrecipe.recipe.references import is_reference
from qrecipe.registry.builtin import PARAMETRIZED, canonical_module_type
from qrecipe.rules.resolution import (
    Decision,
    Resolution,
    describe,
    fused,
    listed,
    quoted,
    rules_for,
)
from qrecipe.rules.structure import ModelStructure, enclosing


def rule_findings(
    recipe: Recipe, structure: ModelStructure, resolution: Resolution, sites: Sequence[Site]
) -> Iterator[Finding]:
    """Warnings about rules for subclasses (QR209), on fused calls (QR238), and without effect."""
    yield from _subclasses(structure, resolution.covered)
    told = {finding.location for finding in resolution.findings}  # an error is enough
    for rule, groups in _fused_away(recipe, resolution, sites).items():
        if rule.location not in told:
            told.add(rule.location)
            yield _fused_finding(rule, groups)
    for rule in _without_effect(recipe, resolution):
        if rule.location not in told:
            yield _shadowed(rule, resolution)


def _fused_away(
    recipe: Recipe, resolution: Resolution, sites: Sequence[Site]
) -> Mapping[Rule, Mapping[str, Decision]]:
    """The rules of the user's files that say otherwise about later members of groups, by group.

    A published recipe names types and functions for many models, and its user cannot mend it.
    """
    mine = {
        each.name
        for each in recipe.ingredients
        if each.publisher is None and not is_reference(each.name)
    }
    floats = {site.name for site in sites if site.qconfig is None}
    found: dict[Rule, dict[str, Decision]] = {}
    for name, decision in resolution.decisions.items():
        for rule in decision.contradicted:
            if rule.location.file in mine and _would_change(rule, name in floats):
                found.setdefault(rule, {})[name] = decision
    return found


def _would_change(rule: Rule, is_float: bool) -> bool:
    """Whether a later member would be computed otherwise if the rule decided it.

    Norms and activations have static kernels alone.
    """
    if rule.qconfig is None:
        return not is_float
    return mode_of(rule.qconfig) == "static"


def _fused_finding(rule: Rule, groups: Mapping[str, Decision]) -> Finding:
    members = [member for decision in groups.values() for member in decision.later[rule]]
    winners = (decision.rule for decision in groups.values())
    deciders = dict.fromkeys(f"{describe(winner)} = {winner.label}" for winner in winners)
    return Finding(
        "QR238",
        f"{describe(rule)} says {rule.label} about {fused(members, [*groups])}, "
        f"decided by {listed([*deciders])}",
        rule.location,
        hint="a group is decided as one, by its first operation: write the rule for "
        f"{rules_for([*groups])}",
    )


def _without_effect(recipe: Recipe, resolution: Resolution) -> Iterator[Rule]:
    """The fully shadowed rules of the outermost file, unless a fused group does as they say.

    Inherited rules may be overridden, and the global rule is required.
    """
    own = recipe.ingredients[0].name
    if is_reference(own):
        return
    decisions = resolution.decisions.values()
    heard = {decision.rule for decision in decisions}
    for decision in decisions:
        heard |= {rule for rule in decision.later if rule.qconfig == decision.rule.qconfig}
    for rule, names in resolution.covered.items():
        if names and rule not in heard and rule.tier != "global" and rule.location.file == own:
            yield rule


def _shadowed(rule: Rule, resolution: Resolution) -> Finding:
    names = resolution.covered[rule]
    deciders = dict.fromkeys(describe(resolution.decisions[name].rule) for name in names)
    return Finding(
        "QR217",
        f"{describe(rule)} has no effect: everything it covers is decided by {listed([*deciders])}",
        rule.location,
        hint=f"it covers {listed(names)}; remove it, or narrow the rule that decides there",
    )


def _subclasses(
    structure: ModelStructure, covered: Mapping[Rule, Sequence[str]]
) -> Iterator[Finding]:
    """Type rules that cover nothing although the model has subclasses of their type (QR209)."""
    sites = {operation.members[0].module for operation in structure.operations}
    derived: dict[str, list[str]] = {}
    for path, bases in structure.bases.items():
        if sites.isdisjoint(enclosing(path)[1:]):  # not inside a site
            for base in bases:
                derived.setdefault(base, []).append(path)
    for rule, names in covered.items():
        if names or rule.tier != "module_type":
            continue
        paths = derived.get(canonical_module_type(rule.key))
        if paths:
            own = sorted(structure.modules[paths[0]])[0]
            yield Finding(
                "QR209",
                f"{describe(rule)} covers nothing: types match exactly, and {listed(paths)} "
                "are subclasses",
                rule.location,
                hint=_REMOVE if own.startswith(PARAMETRIZED) else f"write {quoted(own)}",
            )


_REMOVE = "torch.nn.utils.parametrize.remove_parametrizations makes them plain modules"
