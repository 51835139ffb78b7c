"""What a suggested recipe leaves float, and why: one rule for a type, or one for each site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.backend import FOLLOWERS, can_honour
from qrecipe.planning.engines import is_slow
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.overlay import float_rule, float_rules, rule_key
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.registry.builtin import function_family, is_module_type

_SLOW = "a convolution in small groups: int8 is slower than float here"


def refusals(plan: Plan, inventory: Inventory, known: Mapping[str, str]) -> dict[str, str]:
    """Rules that must leave a site float: what names its type asks for what it cannot have.

    Slow kernels are among them. ``known`` are the keys that already have one.
    """
    members = _members(plan)
    found = {
        rule_key(site.name, members): reason
        for site in plan.sites
        if (reason := _refusal(site, plan, inventory))
    }
    return {key: reason for key, reason in found.items() if key not in known}


def _refusal(site: Site, plan: Plan, inventory: Inventory) -> str | None:
    match = inventory.matches[site.name]
    if _is_slow(site, plan, inventory):
        return _SLOW
    names_type = site.rule.tier in ("module_type", "function")
    if names_type and site.verdict == "float" and not site.rule.is_float:
        return None if match.operation.kind in FOLLOWERS else site.reason
    return None


def _is_slow(site: Site, plan: Plan, inventory: Inventory) -> bool:
    if site.mode != "static" or site.qconfig is None:
        return False
    match = inventory.matches[site.name]
    return is_slow(match, plan.backend, site.qconfig.weight, site.engine)


def rules_of_float_sites(
    plan: Plan, inventory: Inventory, refused: Mapping[str, str], dynamic: QConfigSpec | None
) -> dict[str, dict[str, Any]]:
    """The rules that say of everything without a kernel why it stays float, by tier.

    One for a type or function where that says the same of all of them. What only follows a float
    producer needs none, nor does what a global rule leaves float, but for layers with weights:
    ``dynamic`` is what the others of a dynamic recipe get.
    """
    rules: dict[str, dict[str, Any]] = {"module_type": {}, "function": {}}
    rules |= float_rules(refused)["rules"]
    members = _members(plan)
    left = {
        site.name: why
        for site in plan.sites
        if (why := _left_float(site, plan, inventory, dynamic)) is not None
    }
    for site in plan.sites:
        if site.name in left:
            own = ("module_name", rule_key(site.name, members))
            tier, key = _common_rule(site, plan, left) or own
            rules[tier].setdefault(key, float_rule(left[site.name]))
    return {tier: found for tier, found in rules.items() if found}


def _left_float(
    site: Site, plan: Plan, inventory: Inventory, dynamic: QConfigSpec | None
) -> str | None:
    match = inventory.matches[site.name]
    if site.verdict != "float" or match.operation.kind in FOLLOWERS:
        return None
    if not site.rule.is_float:
        return site.reason
    if site.rule.tier != "global" or dynamic is None or not _has_weights(match):
        return None
    if can_honour(inventory, [site.name], dynamic, plan.backend, plan.phase):
        return None
    return f"{plan.backend} has no dynamic kernel for {site.op}"


def _has_weights(match: Match) -> bool:
    """Whether it multiplies with a matrix of its own; a norm only scales."""
    return match.module is not None and any(p.dim() > 1 for p in match.module.parameters())


def _common_rule(site: Site, plan: Plan, left: Mapping[str, str]) -> tuple[str, str] | None:
    """The tier and key of a rule for all sites of a kind, None where they differ."""
    alike = [other for other in plan.sites if site.op in other.op.split("+")]
    if any(left.get(other.name) != left[site.name] for other in alike):
        return None
    operation = next(each for each in plan.structure.operations if each.name == site.name)
    if len(operation.members) > 1:
        return None
    member = operation.members[0]
    if member.module is None:
        key = min(_known_functions(member.functions), default=None)
        return ("module_name", f"**:{member.op}") if key is None else ("function", key)
    key = min((name for name in member.types if name.startswith("torch.nn.")), default=None)
    return None if key is None or not is_module_type(key) else ("module_type", key)


def _known_functions(names: frozenset[str]) -> Iterator[str]:
    return (
        name for name in names if name.startswith(("torch.", "operator.")) and function_family(name)
    )


def _members(plan: Plan) -> frozenset[str]:
    return frozenset(member for site in plan.sites for member in site.members)
