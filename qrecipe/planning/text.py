"""A plan as a table, and the explanation of a part of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qrecipe.errors.findings import Finding, PlanError, in_full
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import counted, one_line
from qrecipe.planning.asked import ASKED
from qrecipe.planning.plan_values import site_values, spec_values
from qrecipe.recipe.recipe import WrittenRule, published
from qrecipe.recipe.references import BUILTIN
from qrecipe.recipe.schema import Executor, TensorSpec
from qrecipe.rules.resolution import describe, listed
from qrecipe.terminal.report import Listing, Section, Table, Text

if TYPE_CHECKING:
    from qrecipe.planning.plan import Group, Plan, RuleVerdict, Site, Step


class UnknownSiteError(PlanError, KeyError):
    """A name that a plan has no site for."""


def plan_sections(plan: Plan, rules: Table) -> Iterator[Section]:
    """The whole plan: a line on top, the sites, a table of rules, transforms and warnings."""
    yield Text("Plan", [summary(plan), *published(plan.ingredients)])
    yield _with_what_is_outside(plan, site_table(plan.sites))
    yield rules
    if plan.chains:
        rows = [(" > ".join(chain.sites), chain.end) for chain in plan.chains]
        caption = "channels are scaled by powers of two, which the next layer undoes"
        yield Table("Chains", ("chain", "ends because"), rows, caption)
    if plan.groups:
        groups = [(", ".join(each.sites), place_of(each), each.reason) for each in plan.groups]
        caption = "channels are divided by powers of two, which these layers undo"
        yield Table("Groups", ("group", "divided by", "because"), groups, caption)
    if plan.steps:
        steps = [(step.name, kept_by(step), ", ".join(step.changed)) for step in plan.steps]
        caption = "steps of plugins, which change the float model before it is quantized"
        yield Table("Transforms", ("transform", "keeps the outputs", "changed"), steps, caption)
    for text in in_full(plan.warnings, "`warnings` of the plan"):
        yield Listing("Warning", text)


_EXECUTED: Mapping[Executor, str] = {
    "fx": "in FX graph mode",
    "eager": "in eager mode",
    "pt2e": "by PT2E",
}


def _executed(plan: Plan) -> str:
    """What carries the plan out, unless it is what a user expects."""
    is_asked = plan.executor_reason == ASKED
    if plan.executor == "fx" and not is_asked:
        return ""
    return f"; executed {_EXECUTED[plan.executor]}{', as asked' if is_asked else ''}"


def summary(plan: Plan) -> str:
    """One line: recipe, backend, and how many sites become what."""
    counts = Counter(site.verdict for site in plan.sites)
    needs = "; needs a CPU with VNNI" if plan.needs_vnni else ""
    needs += _executed(plan)
    if plan.is_for_export:
        needs = "; gives the reference model, for export"
    return (
        f"{plan.recipe} on {plan.backend} ({plan.phase}): {counted(len(plan.sites), 'site')}, "
        f"{counts['quantized']} quantized, {counts['passthrough']} passthrough, "
        f"{counts['float']} float, {plan.boundaries} q/dq boundaries{needs}"
    )


_SITE_COLUMNS = ("site", "operation", "verdict", "weight/act", "decided by", "why")


def site_table(sites: Sequence[Site], title: str = "Sites", caption: str = "") -> Table:
    """A table of sites; the rule that decided most of them is named below it, not in each row."""
    deciders = Counter(decided_by(site.rule) for site in sites)
    usual, count = next(iter(deciders.most_common(1)), ("", 0))
    folded, note = "", ""
    if count > 1:
        which = f"All {count}" if count == len(sites) else f"{count} of {len(sites)}"
        folded, note = usual, f"{which} sites are decided by {one_line(usual)}."
    rows = [_site_row(site, folded) for site in sites]
    table = Table(title, _SITE_COLUMNS, rows, caption, spare=(4,), noted=5, note=note)
    return table.without_empty_columns()


def _with_what_is_outside(plan: Plan, table: Table) -> Table:
    """The table of sites, with a note on the layers that ``fx.roots`` leave as they are."""
    outside = plan.structure.outside
    if not outside:
        return table
    note = f"Outside fx.roots, and so float: {listed(outside)}."
    return replace(table, note=f"{table.note} {note}".strip())


def _site_row(site: Site, folded: str) -> tuple[str, ...]:
    decider = decided_by(site.rule)
    cells = (site.name, site.op, site.verdict, site.dtypes)
    last = ("" if decider == folded else decider, site.reason or "")
    return tuple(map(one_line, (*cells, *last)))


def kept_by(step: Step) -> str:
    """How far a transform keeps the outputs of the float model."""
    return f"within {step.tolerance:.2g}" if step.tolerance else "to the bit"


def place_of(group: Group) -> str:
    """Where a group's tensor is divided, in words."""
    if group.place == "folded":
        return f"the weights of {group.at}"
    return "a product in float" if group.place == "product" else "nothing"


def rules_that_matter(plan: Plan) -> Table:
    """The table of rules, without unused rules of shipped recipes.

    The shipped recipes name more types than most models have.
    """
    left_out = {
        rule
        for rule in plan.rules
        if rule.verdict == "unused" and rule.location.file.startswith(f"{BUILTIN}:")
    }
    counts = Counter(rule.location.file for rule in left_out)
    shipped = ", ".join(f"{counted(count, 'rule')} of {name}" for name, count in counts.items())
    note = f"Not listed: {shipped} for what this model does not have." if shipped else ""
    return replace(rule_table([rule for rule in plan.rules if rule not in left_out]), note=note)


def rule_table(rules: Sequence[RuleVerdict]) -> Table:
    """A table of rules, with where each is written and what became of it."""
    rows = [
        (
            describe(verdict.rule),
            verdict.rule.label,
            verdict.verdict,
            str(len(verdict.sites)),
            str(verdict.location),
            verdict.rule.reason or "",
        )
        for verdict in rules
    ]
    header = ("rule", "says", "verdict", "sites", "set at", "reason")
    return Table("Rules", header, rows).without_empty_columns()


def decided_by(rule: WrittenRule) -> str:
    """A rule and what it says: ``module_type "torch.nn.Conv2d" = int8``."""
    return f"{describe(rule)} = {rule.label}"


def explanation(plan: Plan, name: str) -> str:
    """Why a site or member is decided as it is, or a table of a module's inside."""
    canonical = plan.structure.aliases.get(name, name)
    calls = _sites_of_calls(plan, canonical)
    publishers = published(plan.ingredients)
    sources = ["\n".join(publishers)] if publishers else []
    if calls:
        alias = [f"{name} is another name of {canonical}"] if canonical != name else []
        texts = ["\n".join(_site_lines(plan, site, member)) for member, site in calls]
        return "\n\n".join([*alias, *texts, *sources])
    if any(member.name == canonical for member in plan.structure.idle):
        return (
            f"{name} does nothing outside training or only computes with stored tensors, and has "
            "no site"
        )
    inside = _sites_inside(plan, canonical, name)
    if not plan.structure.is_traced(canonical):
        return f"{name} is outside fx.roots, and runs as it is"
    if not inside:
        return f"{name}: nothing in it is called that can be quantized"
    fused = [site for site in inside if not _holds(canonical, site.name)]
    own = counted(len(inside) - len(fused), "site") if len(fused) < len(inside) else "no own site"
    elsewhere = "\n".join(_fused_line(site, canonical) for site in fused)
    head = f"{name or 'the model'} has {own}"
    return "\n\n".join(filter(None, [head, site_table(inside).text(), elsewhere, *sources]))


def _fused_line(site: Site, path: str) -> str:
    """What a module gives to a fused group that begins outside it."""
    members = [member for member in site.members if _holds(path, member)]
    are = "is a member" if len(members) == 1 else "are members"
    return f"{listed(members)} {are} of a fused group, decided as {site.name}"


def explanation_json(plan: Plan, name: str) -> dict[str, Any]:
    """The sites that a name stands for, its calls or what is inside it, as plain values.

    Raises ``PlanError`` (QR310) as `explanation` does.
    """
    canonical = plan.structure.aliases.get(name, name)
    sites = [site for _, site in _sites_of_calls(plan, canonical)]
    sites = sites or _sites_inside(plan, canonical, name)
    return {
        "name": name,
        "canonical": canonical,
        "sites": [site_values(site) for site in sites],
        "ingredients": [each.to_json() for each in plan.ingredients],
        "findings": [finding.to_json() for finding in plan.findings],
    }


def site_named(plan: Plan, name: str) -> Site:
    """The site that a name or a member's name stands for; of several calls the first one's."""
    name = str(name)  # an index is a name that no site has
    calls = _sites_of_calls(plan, str(plan.structure.aliases.get(name, name)))
    if not calls:
        raise _unknown(plan, "site or member", name, ())
    return calls[0][1]


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


def _sites_inside(plan: Plan, path: str, name: str) -> list[Site]:
    """The sites in a module, which the caller calls ``name``."""
    inside = [site for site in plan.sites if any(_holds(path, each) for each in site.members)]
    if not inside and path not in plan.structure.modules:
        raise _unknown(plan, "site, member or module", name, plan.structure.modules)
    return inside


def _unknown(plan: Plan, kind: str, name: str, modules: Iterable[str]) -> UnknownSiteError:
    members = [member for site in plan for member in site.members]
    known = [*members, *modules, *plan.structure.aliases]
    hint = did_you_mean(str(name), known) or "`qrecipe plan` lists the names"
    return UnknownSiteError(Finding("QR310", f'the model has no {kind} "{name}"', hint=hint), plan)


def _holds(path: str, member: str) -> bool:
    """Whether a call is that of the module at ``path``, or inside it."""
    inside = (f"{path}.", f"{path}:", f"{path}#")
    return not path or member == path or member.startswith(inside)


def _site_lines(plan: Plan, site: Site, wanted: str) -> Iterator[str]:
    yield f"{site.name}  {site.op}"
    if wanted != site.name:
        yield f"  {wanted} is a member of this fused group, decided as {site.name}"
    yield f"  verdict    {site.verdict}: {site.dtypes}"
    if site.reason:
        yield f"  why        {site.reason}"
    if len(site.members) > 1:
        yield f"  members    {', '.join(site.members)}"
    yield f"  rule       {decided_by(site.rule)}  ({site.rule.location})"
    if site.rule.reason:
        yield f"  reason     {site.rule.reason}"
    for rule in site.shadowed:
        yield f"  shadowed   {decided_by(rule)}  ({rule.location})"
    if site.qconfig is not None:
        for role, spec in (
            ("weight", site.qconfig.weight),
            ("activation", site.qconfig.activation),
        ):
            if spec is not None:
                yield f"  {role:<10} {_spec_text(spec)}"
    yield from _transform_lines(plan, site)
    if site.input is not None:
        yield "  input      arrives as float and is quantized by the activation spec"


def _transform_lines(plan: Plan, site: Site) -> Iterator[str]:
    for chain in plan.chains:
        if site.name in chain.sites:
            yield f"  chain      {' > '.join(chain.sites)}; {chain.end}"

    for group in plan.groups:
        if site.name in (*group.sites, group.at):
            because = f", because {group.reason}" if group.reason else ""
            divided = f"divided by {place_of(group)}{because}"
            yield f"  group      {', '.join(group.sites)}; {divided}"
    for step in plan.steps:
        if not site.modules.isdisjoint(step.changed):
            yield f"  transform  {step.name} has changed its tensors"
        if site.name in step.moved:
            yield f"  transform  {step.name} has moved its result"


def _spec_text(spec: TensorSpec) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in spec_values(spec).items())
