"""Decides every site of a model before anything is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from qrecipe.errors.findings import Finding, error_from
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import warn
from qrecipe.model.addresses import SITE
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Inventory, readers_of
from qrecipe.model.moving import PIECE
from qrecipe.observers.qconfig import factory
from qrecipe.planning.advice import advice, branch_findings, shared_norm_findings
from qrecipe.planning.asked import ASKED
from qrecipe.planning.backend import (
    FOLLOWERS,
    Outcome,
    can_honour,
    outcomes,
    saturating,
)
from qrecipe.planning.changes import chosen_changes
from qrecipe.planning.clamps import clamps
from qrecipe.planning.coverage import coverage_findings
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.masked_sums import mask_findings, masked_sums
from qrecipe.planning.plan import Plan, RuleOutcome, RuleVerdict, Site
from qrecipe.planning.rule_warnings import rule_findings
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.recipe import Recipe, Rule
from qrecipe.recipe.schema import Executor, Phase, TensorSpec
from qrecipe.rules.resolution import Resolution, describe, listed, resolve
from qrecipe.rules.structure import Operation


def make_plan(inventory: Inventory, recipe: Recipe) -> Plan:
    """Decide every site. Raises ``PlanError`` with all findings and the complete plan."""
    resolution = resolve(inventory.structure, recipe.rules)
    executor = recipe.executor or ("fx" if inventory.untraced is None else "eager")
    outcome_of = outcomes(inventory, resolution.decisions, recipe.backend, recipe.phase, executor)
    unsupported = dict(_unsupported(inventory, resolution, outcome_of, recipe, executor))
    sites = tuple(_sites(inventory, resolution, outcome_of))
    changes = chosen_changes(inventory, sites, recipe)
    findings = (
        *resolution.findings,
        *(each for each in changes.findings if each.severity == "error"),
        *unsupported.values(),
        *_input_conflicts(sites, inventory),
        *_unmakeable(sites, recipe.phase),
        *(shared_norm_findings(sites, inventory) if recipe.phase == "qat" else ()),
    )
    findings = tuple(
        sorted(findings, key=lambda each: each.location.place if each.location else ("", 0, 0))
    )
    boundaries = _boundaries(sites, inventory)
    saturated = saturating(inventory, outcome_of, recipe.backend)
    plan = Plan(
        sites=sites,
        rules=tuple(_rule_verdicts(recipe.rules, resolution, unsupported)),
        findings=findings,
        warnings=tuple(
            finding
            for finding in (
                *advice(sites, inventory, recipe.backend, executor, boundaries),
                *rule_findings(recipe, inventory.structure, resolution, sites),
                *branch_findings(inventory),
                *mask_findings(masked_sums(sites, inventory)),
                *_untraced(inventory, recipe),
                *(each for each in changes.findings if each.severity == "warning"),
            )
            if finding.code not in recipe.lint.ignore
        ),
        boundaries=boundaries,
        recipe=recipe.reference or recipe.path or recipe.name or "recipe",
        fingerprint=recipe.fingerprint,
        backend=recipe.backend,
        phase=recipe.phase,
        executor=executor,
        ingredients=recipe.ingredients,
        executor_reason=_why_executor(inventory, recipe),
        chains=changes.chains,
        groups=changes.groups,
        steps=changes.steps,
        structure=inventory.structure,
        needs_vnni=bool(saturated),
        saturating=saturated,
    )
    if findings:
        raise error_from(findings, plan)
    return plan


def _sites(
    inventory: Inventory, resolution: Resolution, outcome_of: Mapping[str, Outcome]
) -> Iterator[Site]:
    integers = {name for name, outcome in outcome_of.items() if outcome.rounded is not None}
    clamped = clamps(inventory, outcome_of)
    for operation in inventory.structure.operations:
        decision, outcome = resolution.decisions[operation.name], outcome_of[operation.name]
        reads = tuple(_reads(operation))
        reads_float = outcome.verdict == "quantized" and not integers.issuperset(reads)
        clamp = clamped.get(operation.name)
        texts = outcome.reason, None if clamp is None else clamp.reason
        yield Site(
            name=operation.name,
            op=operation.op,
            members=tuple(member.name for member in operation.members),
            qconfig=outcome.qconfig,
            input=outcome.qconfig.activation if outcome.qconfig and reads_float else None,
            mode=outcome.mode,
            rule=decision.rule.as_written,
            shadowed=tuple(rule.as_written for rule in decision.shadowed),
            verdict=outcome.verdict,
            reason="; ".join(filter(None, texts)) or None,
            engine=outcome.engine,
            clamp=None if clamp is None else clamp.limits,
            reads=reads,
            is_output=operation.is_output,
        )


def _reads(operation: Operation) -> Iterator[str]:
    """What an operation computes with: inputs, parameters, and results of others."""
    yield from (f'input "{name}"' for name in operation.model_inputs)
    yield from (f'parameter "{name}"' for name in operation.stored)
    yield from operation.producers


def _unsupported(
    inventory: Inventory,
    resolution: Resolution,
    outcome_of: Mapping[str, Outcome],
    recipe: Recipe,
    executor: Executor,
) -> Iterator[tuple[Rule, Finding]]:
    decisions = resolution.decisions
    for rule, covered in resolution.covered.items():
        if rule.qconfig is None:
            continue
        decided = [name for name in covered if decisions[name].rule is rule]
        failed = [name for name in decided if not outcome_of[name].honoured]
        refused = [name for name in failed if decisions[name].names_operation]
        if not refused:
            won = {n for n in decided if inventory.matches[n].operation.kind not in FOLLOWERS}
            refused = [name for name in failed if name in won]
            if not refused or len(refused) < len(won):
                continue
            own = (recipe.backend, recipe.phase, executor)
            if can_honour(inventory, covered, rule.qconfig, *own):
                continue
        fault = outcome_of[refused[0]].fault
        cause = None if fault is None else recipe.tensor_key(rule, fault.role, fault.key)
        yield (
            rule,
            Finding(
                "QR303",
                f"{describe(rule)} cannot be honoured at {listed(refused)}",
                cause or rule.location,
                hint=outcome_of[refused[0]].reason,
                related=() if cause is None else (("decided by", rule.location),),
                notes=('leave them "float", or give them a qconfig that a kernel supports',),
            ),
        )


def _readers_of_float(
    sites: Sequence[Site], inventory: Inventory
) -> dict[tuple[fx.Graph | None, str], list[Site]]:
    """The float tensors that are quantized, and the sites that do so.

    Roots may have inputs of the same name, so a tensor is known by its graph and its name.
    """
    readers: dict[tuple[fx.Graph | None, str], list[Site]] = {}
    integers = {site.name for site in sites if site.gives_integers}
    for site in sites:
        if site.mode == "static" and site.input is not None:
            nodes = inventory.matches[site.name].nodes
            graph = nodes[0].graph if nodes else None
            for source in site.reads:
                if source not in integers:
                    readers.setdefault((graph, source), []).append(site)
    return readers


def _input_conflicts(sites: Sequence[Site], inventory: Inventory) -> Iterator[Finding]:
    """FX silently gives all consumers of a float tensor the first one's observer."""
    for (_, source), (first, *others) in _readers_of_float(sites, inventory).items():
        other = next((site for site in others if site.input != first.input), None)
        if other is not None:
            yield Finding(
                "QR304",
                f"{first.name} and {other.name} both read {source} as float, with different "
                "activation specs",
                first.rule.location,
                hint="give both the same activation spec, or quantize what they read",
                related=(("against", other.rule.location),),
            )


def _boundaries(sites: Sequence[Site], inventory: Inventory) -> int:
    """The number of tensors that are quantized or dequantized; each costs a pass over memory."""
    static = {site.name for site in sites if site.mode == "static"}
    integers = {site.name for site in sites if site.gives_integers}
    returned = {site.name for site in sites if site.is_output}
    read = {source for site in sites if site.name not in static for source in site.reads}
    quantized = (
        _results(inventory, source, lambda reader: reader in static)
        for _, source in _readers_of_float(sites, inventory)
    )
    read_as_float = (
        _results(inventory, name, lambda reader: reader not in static)
        for name in integers & (read | returned)
    )
    return sum(quantized) + sum(read_as_float)


def _results(inventory: Inventory, source: str, counts: Callable[[str | None], bool]) -> int:
    """The results of a site that have a reader of some kind: one, unless the site gives several.

    ``counts`` tells the kind by the name of a reading site, None for the model's output.
    """
    nodes = inventory.matches[source].nodes if source in inventory.matches else ()
    pieces = [node for node in nodes if PIECE in node.meta]
    read = sum(
        any(
            counts(reader.meta.get(SITE))
            for reader in readers_of(piece)
            if reader.op == "output" or SITE in reader.meta
        )
        for piece in pieces
    )
    return read if pieces else 1


def _unmakeable(sites: Sequence[Site], phase: Phase) -> Iterator[Finding]:
    """Observers that reject their arguments; torch would only notice while preparing."""
    tried: set[TensorSpec] = set()
    for site in sites:
        qconfig = site.qconfig
        for spec in (qconfig.weight, qconfig.activation) if qconfig is not None else ():
            if spec is None or spec in tried:
                continue
            tried.add(spec)
            try:
                factory(spec, phase)()
            except Exception as error:
                raise_lack_of_memory(error)
                observer = spec.observer.name if spec.observer is not None else "placeholder"
                yield Finding(
                    "QR311",
                    f'observer "{observer}" cannot be created for {site.name}: {first_line(error)}',
                    site.rule.location,
                    hint="fix the arguments or the settings of its tensor",
                )


def _why_executor(inventory: Inventory, recipe: Recipe) -> str:
    if recipe.executor is not None:
        return ASKED
    untraced = inventory.untraced
    return "the model can be traced" if untraced is None else untraced.message


def _untraced(inventory: Inventory, recipe: Recipe) -> Iterator[Finding]:
    missed = inventory.unreached
    if inventory.untraced is None or (recipe.executor is not None and not missed):
        return
    cure = inventory.untraced.hint or ""
    notes = (
        f"to trace it, {cure}" if cure and inventory.untraced.code == "QR305" else cure,
        f"not reached by the example inputs, and so left float: {listed(missed)}" if missed else "",
    )
    yield Finding(
        "QR210",
        f"quantized module by module, because {inventory.untraced.message}",
        hint=_TRACE_PARTS if recipe.executor is None else None,
        notes=tuple(filter(None, notes)),
    )


_TRACE_PARTS = "functions stay float; [fx] roots would trace parts of the model"


def _rule_verdicts(
    rules: Sequence[Rule], resolution: Resolution, unsupported: Mapping[Rule, Any]
) -> Iterator[RuleVerdict]:
    unmatched = {finding.location for finding in resolution.findings if finding.code == "QR301"}
    winners = {decision.rule for decision in resolution.decisions.values()}
    for rule in sorted(rules, key=lambda rule: (rule.location.file, rule.location.line)):
        verdict: RuleOutcome
        if rule in unsupported:
            verdict = "unsupported"
        elif rule in winners:
            verdict = "applied"
        elif resolution.covered[rule]:
            verdict = "shadowed"
        else:
            verdict = "unmatched" if rule.location in unmatched else "unused"
        yield RuleVerdict(rule.as_written, verdict, resolution.covered[rule])


def decide(model: nn.Module, recipe: Recipe, inputs: Inputs) -> Plan:
    """The plan for a model, without issuing its warnings.

    Raises like `qrecipe.plan`.
    """
    return plan_of(inventory_of(model, recipe, inputs), recipe, inputs)


def plan_of(inventory: Inventory, recipe: Recipe, inputs: Inputs) -> Plan:
    """The plan for an inventory, with a warning (QR221) if almost nothing is quantized."""
    made = make_plan(inventory, recipe)
    if "QR221" in recipe.lint.ignore:
        return made
    missed = coverage_findings(made, inventory, inputs)
    return replace(made, warnings=(*missed, *made.warnings))


def warn_of_missed(plan: Plan, recipe: Recipe) -> None:
    """Issue the warnings that matter even if nobody prints the plan.

    Nothing is quantized (QR221), training would go without what only it has (QR205), kernels are
    slower than float (QR207), a transform has nothing to do (QR222), a mask takes the range of a
    sum (QR237), or a rule is on calls that are fused into another group (QR238).
    """
    for finding in plan.warnings:
        if finding.code in ("QR221", "QR205", "QR207", "QR222", "QR237", "QR238"):
            warn(finding, recipe.lint.ignore)
