"""What a suggested recipe leaves float, and why: one rule per type, or one per site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qrecipe.authoring.suggest.delicate import divisors, fed_by_floats, residual_sums, slow_norms
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.opened.whole import Whole
from qrecipe.planning.backend import FOLLOWERS, can_honour
from qrecipe.planning.engines import is_slow
from qrecipe.planning.masked_sums import masked_sums
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.overlay import float_rule, float_rules, rule_key
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.registry.builtin import function_family, is_module_type

MASKED = "a mask enters it, and would take the whole range of its result"
_RESIDUAL = "a residual sum of a transformer: all later layers read what int8 would round"
_FED_BY_FLOATS = "its input is float, and the int8 kernel would round that and is slower"
_SLOW_NORM = "its int8 kernel is slower than a float one with its conversion"
_DIVISOR = "its result is a divisor, and int8 would round small ones to 0"
_SLOW = "a convolution whose int8 kernel is slower than float"


def refusals(plan: Plan, inventory: Inventory, known: Mapping[str, str]) -> dict[str, str]:
    """The sites that must be left float, with reasons: the rule for their type cannot be honoured.

    Sites with slow kernels, divisors, sums that a mask enters, residual sums and norms that float
    serves better are included, sites in ``known`` are not.
    """
    members = plan.members
    better_float = {
        **dict.fromkeys(residual_sums(plan, inventory), _RESIDUAL),
        **dict.fromkeys(slow_norms(plan, inventory), _SLOW_NORM),
        **dict.fromkeys(fed_by_floats(plan, inventory), _FED_BY_FLOATS),
        **dict.fromkeys(divisors(plan, inventory), _DIVISOR),
        **dict.fromkeys(masked_sums(plan.sites, inventory), MASKED),
    }
    found = {
        rule_key(site.name, members): reason
        for site in plan.sites
        if (reason := better_float.get(site.name) or _refusal(site, plan, inventory))
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
    """The rules, by tier, that say why operations without a kernel stay float.

    A type or function gets one rule if it is the same for all of its sites. Operations that only
    follow a float producer need none; nor do those that a global rule leaves float, except layers
    with weights (``dynamic`` is what other layers of a dynamic recipe get).
    """
    rules: dict[str, dict[str, Any]] = {"module_type": {}, "function": {}}
    rules |= float_rules(refused)["rules"]
    members = plan.members
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
    is_follower = match.operation.kind in FOLLOWERS or isinstance(match.module, Whole)
    if site.verdict != "float" or is_follower:
        return None
    if not site.rule.is_float:
        return site.reason
    if site.rule.tier != "global" or dynamic is None or not match.has_weights:
        return None
    if can_honour(inventory, [site.name], dynamic, plan.backend, plan.phase, plan.executor):
        return None
    return f"{plan.backend} has no dynamic kernel for {site.op}"


def _common_rule(site: Site, plan: Plan, left: Mapping[str, str]) -> tuple[str, str] | None:
    """The tier and key of one rule for all sites of a kind; None if they differ."""
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
