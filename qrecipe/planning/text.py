"""A plan as a table, as an explanation and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qrecipe.errors.findings import Finding, PlanError
from qrecipe.errors.spelling import did_you_mean
from qrecipe.recipe.recipe import QConfigSpec, Rule, published
from qrecipe.recipe.schema import TensorSpec
from qrecipe.rules.resolution import describe
from qrecipe.terminal.tables import render_table

if TYPE_CHECKING:
    from qrecipe.planning.plan import Plan, Site


def plan_text(plan: Plan) -> str:
    """The whole plan: a line on top, the sites, the rules."""
    warnings = [str(finding) for finding in plan.warnings]
    head = "\n".join([summary(plan), *published(plan.ingredients)])
    return "\n\n".join([head, _site_table(plan.sites), _rule_table(plan), *warnings])


_EXECUTED: Mapping[str, str] = {"eager": "; executed in eager mode"}
"""What a plan says of an executor that a user may not expect."""


def summary(plan: Plan) -> str:
    """One line: recipe, backend, and how many sites become what."""
    counts = Counter(site.verdict for site in plan.sites)
    needs = "; needs a CPU with VNNI" if plan.needs_vnni else ""
    needs += _EXECUTED.get(plan.executor, "")
    if plan.is_for_export:
        needs = "; gives the reference model, for export"
    return (
        f"{plan.recipe} on {plan.backend} ({plan.phase}): {len(plan.sites)} sites, "
        f"{counts['quantized']} quantized, {counts['passthrough']} passthrough, "
        f"{counts['float']} float, {plan.boundaries} q/dq boundaries{needs}"
    )


def _site_table(sites: tuple[Site, ...] | list[Site]) -> str:
    rows = [
        (site.name, site.op, site.verdict, site.dtypes, _by(site.rule), site.reason or "")
        for site in sites
    ]
    return render_table(("site", "operation", "verdict", "weight/act", "decided by", "why"), rows)


def _rule_table(plan: Plan) -> str:
    rows = [
        (
            describe(verdict.rule),
            verdict.rule.label,
            verdict.verdict,
            str(len(verdict.sites)),
            str(verdict.location),
            verdict.rule.reason or "",
        )
        for verdict in plan.rules
    ]
    return render_table(("rule", "says", "verdict", "sites", "set at", "reason"), rows)


def _by(rule: Rule) -> str:
    return f"{describe(rule)} = {rule.label}"


def explanation(plan: Plan, name: str) -> str:
    """Why a site or member is decided as it is, or a table of a module's inside."""
    canonical = plan.structure.aliases.get(name, name)
    calls = _sites_of_calls(plan, canonical)
    publishers = published(plan.ingredients)
    sources = ["\n".join(publishers)] if publishers else []
    if calls:
        alias = [f"{name} is another name of {canonical}"] if canonical != name else []
        texts = ["\n".join(_site_lines(site, member)) for member, site in calls]
        return "\n\n".join([*alias, *texts, *sources])
    if canonical not in plan.structure.modules:
        raise _unknown_name(plan, name)
    inside = _sites_inside(plan, canonical)
    if not inside:
        return f"{name}: nothing in it is called that quantization can decide about"
    head = f"{name or 'the model'} holds {len(inside)} sites"
    return "\n\n".join([head, _site_table(inside), *sources])


def explanation_json(plan: Plan, name: str) -> dict[str, Any]:
    """The sites that a name stands for, its calls or what is inside it, as plain values.

    Raises ``PlanError`` (QR310) as `explanation` does.
    """
    canonical = plan.structure.aliases.get(name, name)
    sites = [site for _, site in _sites_of_calls(plan, canonical)]
    if not sites and canonical not in plan.structure.modules:
        raise _unknown_name(plan, name)
    sites = sites or _sites_inside(plan, canonical)
    return {
        "name": name,
        "canonical": canonical,
        "sites": [_site_json(site) for site in sites],
        "ingredients": [each.to_json() for each in plan.ingredients],
    }


def _sites_of_calls(plan: Plan, name: str) -> list[tuple[str, Site]]:
    """Each call that a name selects, with its site: all of them without ``#``."""
    wanted = name.removesuffix("#0")
    every = wanted == name
    return [
        (member, site)
        for site in plan.sites
        for member in site.members
        if member == wanted or (every and member.startswith(f"{wanted}#"))
    ]


def _sites_inside(plan: Plan, path: str) -> list[Site]:
    return [site for site in plan.sites if _is_inside(site, path)]


def _unknown_name(plan: Plan, name: str) -> PlanError:
    members = [member for site in plan.sites for member in site.members]
    known = [*members, *plan.structure.modules, *plan.structure.aliases]
    return PlanError(
        Finding(
            "QR310",
            f'the model has no site, member or module "{name}"',
            hint=did_you_mean(name, known) or "`qrecipe plan` lists the names",
        ),
        plan,
    )


def _is_inside(site: Site, path: str) -> bool:
    return not path or any(
        member == path or member.startswith((f"{path}.", f"{path}:", f"{path}#"))
        for member in site.members
    )


def _site_lines(site: Site, wanted: str) -> Iterator[str]:
    yield f"{site.name}  {site.op}"
    if wanted != site.name:
        yield f"  {wanted} is a member of this group, which {site.name} names and decides"
    yield f"  verdict    {site.verdict}: {site.dtypes}"
    if site.reason:
        yield f"  why        {site.reason}"
    if len(site.members) > 1:
        yield f"  members    {', '.join(site.members)}"
    yield f"  rule       {_by(site.rule)}  ({site.rule.location})"
    if site.rule.reason:
        yield f"  reason     {site.rule.reason}"
    for rule in site.shadowed:
        yield f"  shadowed   {_by(rule)}  ({rule.location})"
    if site.qconfig is not None:
        for role, spec in (
            ("weight", site.qconfig.weight),
            ("activation", site.qconfig.activation),
        ):
            if spec is not None:
                yield f"  {role:<10} {_spec_text(spec)}"
    if site.input is not None:
        yield "  input      arrives as float and is quantized by the activation spec"


def _spec_text(spec: TensorSpec) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in spec_json(spec).items())


def spec_json(spec: TensorSpec) -> dict[str, Any]:
    """The keys of a tensor spec that are set, as plain values."""
    values: dict[str, Any] = spec.model_dump(exclude_none=True)
    for key in ("observer", "fake_quant"):
        constructor = values.get(key)
        if constructor is not None and set(constructor) == {"name"}:
            values[key] = constructor["name"]
    return values


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; recipes are named as their author named them."""
    return {
        "recipe": plan.recipe,
        "fingerprint": plan.fingerprint,
        "ingredients": [each.to_json() for each in plan.ingredients],
        "backend": plan.backend,
        "phase": plan.phase,
        "executor": plan.executor,
        "needs_vnni": plan.needs_vnni,
        "is_for_export": plan.is_for_export,
        "sites": [_site_json(site) for site in plan.sites],
        "rules": [
            {
                **_rule_json(verdict.rule),
                "verdict": verdict.verdict,
                "sites": list(verdict.sites),
            }
            for verdict in plan.rules
        ],
        "boundaries": plan.boundaries,
        "warnings": [finding.to_json() for finding in plan.warnings],
        "findings": [finding.to_json() for finding in plan.findings],
    }


def _site_json(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "op": site.op,
        "members": list(site.members),
        "verdict": site.verdict,
        "mode": site.mode,
        "reason": site.reason,
        "engine": site.engine,
        "qconfig": _qconfig_json(site.qconfig),
        "input": None if site.input is None else spec_json(site.input),
        "rule": _rule_json(site.rule),
        "shadowed": [_rule_json(rule) for rule in site.shadowed],
    }


def _qconfig_json(qconfig: QConfigSpec | None) -> dict[str, Any] | None:
    if qconfig is None:
        return None
    return {
        "weight": None if qconfig.weight is None else spec_json(qconfig.weight),
        "activation": None if qconfig.activation is None else spec_json(qconfig.activation),
    }


def _rule_json(rule: Rule) -> dict[str, Any]:
    return {
        "tier": rule.tier,
        "key": rule.key,
        "says": rule.label,
        "reason": rule.reason,
        "location": str(rule.location),
    }
