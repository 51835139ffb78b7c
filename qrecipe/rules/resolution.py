"""Decides which rule wins for each operation.

1. ``module_name`` beats ``module_type`` and ``function``, which beat ``global``.
2. Within a tier, a rule covers what it matches and everything inside, and the rule that matches the
   nearest enclosing module wins; the operation itself is nearest.
3. Then an exact name beats a glob, and a recipe beats the ones that it extends.
4. If several rules remain and differ, they contradict each other.

A fused group is decided by its first member. If a rule by name names a later member itself and says
otherwise, that is a conflict; other rules on later members are shadowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from qrecipe.errors.findings import Finding
from qrecipe.errors.spelling import few_suggestions, nearest
from qrecipe.errors.text import counted
from qrecipe.recipe.patterns import NamePatterns, is_exact, literal
from qrecipe.recipe.recipe import Rule, WrittenRule
from qrecipe.registry.builtin import function_family, is_module_type
from qrecipe.rules.matching import RuleIndex
from qrecipe.rules.structure import Member, ModelStructure, Operation

_TIER_RANK = {"module_name": 0, "module_type": 1, "function": 1, "global": 2}


@dataclass(frozen=True, slots=True)
class Decision:
    """The winning rule of an operation and the rules that it shadows.

    ``names_operation`` means that the winner names the operation itself: by its exact name, its
    leaf type or its function. ``later`` are the shadowed rules that would decide later members of
    the fused group alone and do not cover the first one, with those members.
    """

    operation: Operation
    rule: Rule
    shadowed: tuple[Rule, ...]
    names_operation: bool
    later: Mapping[Rule, tuple[str, ...]]

    @property
    def contradicted(self) -> Mapping[Rule, tuple[str, ...]]:
        """Those of ``later`` that say otherwise, and that neither tier nor recipe beats."""
        rank = _TIER_RANK[self.rule.tier]
        return {
            rule: members
            for rule, members in self.later.items()
            if rule.qconfig != self.rule.qconfig
            and rule.layer not in self.rule.overrides
            and _TIER_RANK[rule.tier] <= rank
        }


@dataclass(frozen=True, slots=True)
class Resolution:
    """The decision of each operation by name, the operations of each rule, and the findings."""

    decisions: Mapping[str, Decision]
    covered: Mapping[Rule, tuple[str, ...]]
    findings: tuple[Finding, ...]


def resolve(structure: ModelStructure, rules: Sequence[Rule]) -> Resolution:
    """Decide every operation of a model; findings are returned, not raised."""
    # the result must not depend on the order of keys in a file, not even in messages
    rules = sorted(rules, key=lambda rule: (_TIER_RANK[rule.tier], rule.tier, rule.key, rule.layer))
    index = RuleIndex(structure, rules)
    covered: dict[Rule, list[str]] = {rule: [] for rule in rules}
    decisions: dict[str, Decision] = {}
    conflicts = _Conflicts()
    for operation in structure.operations:
        decision = _decide(operation, rules, index, conflicts)
        decisions[operation.name] = decision
        for rule in (decision.rule, *decision.shadowed) if not operation.is_inserted else ():
            covered[rule].append(operation.name)
    uncovered = _coverage_findings(structure, rules, covered, index)
    return Resolution(
        decisions,
        {rule: tuple(names) for rule, names in covered.items()},
        (*conflicts.findings(), *uncovered),
    )


@dataclass(slots=True)
class _Conflicts:
    """Pairs of a winner and a rule that contradicts it, and where.

    ``equals`` has the operations about which both have equal rank, ``later`` the fused groups with
    the later member that the second one names.
    """

    equals: dict[tuple[Rule, Rule], list[str]] = field(default_factory=dict)
    later: dict[tuple[Rule, Rule], dict[str, str]] = field(default_factory=dict)

    def findings(self) -> Iterator[Finding]:
        for (winner, rival), names in self.equals.items():
            yield Finding(
                "QR304",
                f"{describe(winner)} says {winner.label} and {describe(rival)} says {rival.label} "
                f"about {listed(names)}, with equal rank",
                winner.location,
                hint="remove one of them, or add a rule with the exact name of the site",
                related=(("against", rival.location),),
            )
        for (winner, rival), groups in self.later.items():
            yield Finding(
                "QR304",
                f"{describe(rival)} says {rival.label} about "
                f"{fused([*groups.values()], [*groups])}, which {describe(winner)} makes "
                f"{winner.label}",
                rival.location,
                hint=f"a group is decided as one: write the rule for {rules_for([*groups])}",
                related=(("decided at", winner.location),),
            )


def _decide(
    operation: Operation, rules: Sequence[Rule], index: RuleIndex, conflicts: _Conflicts
) -> Decision:
    """The decision; what contradicts it is added to ``conflicts``."""
    first, *others = operation.members
    distances = index.distances(first)
    ranked, top = _ranked(distances, rules, index)
    winner = rules[top[0]]
    later: dict[Rule, list[str]] = {}
    on_members: set[int] = set()
    for member in others:
        found = index.distances(member)
        on_members |= found.keys() - distances.keys()
        nearest_one = _ranked(found, rules, index)[1][0]
        if nearest_one not in distances:
            later.setdefault(rules[nearest_one], []).append(member.name)
    shadowed = (rules[at] for at in (*ranked, *sorted(on_members)) if rules[at] is not winner)
    names_it = winner.tier != "global" and distances[top[0]] == 0 and top[0] not in index.globs
    on_later = {rule: tuple(members) for rule, members in later.items()}
    for rival in (rules[at] for at in top if rules[at].qconfig != winner.qconfig):
        conflicts.equals.setdefault((winner, rival), []).append(operation.name)
    for rival, named in _rivals(winner, others, rules, index):
        conflicts.later.setdefault((winner, rival), {})[operation.name] = named
    return Decision(operation, winner, tuple(shadowed), names_it, on_later)


def _ranked(
    distances: Mapping[int, int], rules: Sequence[Rule], index: RuleIndex
) -> tuple[list[int], list[int]]:
    """The rules on a call by rank, and those that win, which should agree."""

    def rank(at: int) -> tuple[int, int, bool]:
        return _TIER_RANK[rules[at].tier], distances[at], at in index.globs

    ranked = sorted(sorted(distances), key=rank)
    _, peers = next(groupby(ranked, key=rank))
    nearest_ones = list(peers)
    beaten = frozenset[str]().union(*{rules[at].overrides for at in nearest_ones})
    return ranked, [at for at in nearest_ones if rules[at].layer not in beaten]


def _rivals(
    winner: Rule, others: Sequence[Member], rules: Sequence[Rule], index: RuleIndex
) -> Iterator[tuple[Rule, str]]:
    """Rules that name a later member of the group and decide it differently, with that member.

    As elsewhere, the winner beats the rules of recipes that its own one extends.
    """
    named = {at: member.name for member in reversed(others) for at in index.of_call(member)}
    for at in sorted(named):
        rule = rules[at]
        if rule.layer not in winner.overrides and rule.qconfig != winner.qconfig:
            yield rule, named[at]


def _coverage_findings(
    structure: ModelStructure,
    rules: Sequence[Rule],
    covered: Mapping[Rule, Sequence[str]],
    index: RuleIndex,
) -> Iterator[Finding]:
    unmatched = {}
    for at, rule in enumerate(rules):
        count = len(covered[rule])
        if rule.expect == count or (count == 0 and rule.optional):
            continue
        if count == 0 and not _may_be_unused(rule):
            unmatched[at] = rule
        elif rule.expect is not None:
            yield Finding(
                "QR302",
                f"{describe(rule)} covers {counted(count, 'site')}, not {rule.expect}: "
                f"{listed(covered[rule])}",
                rule.location,
                hint=f"write expect = {count} if that is intended",
            )
    if unmatched:
        uncalled = index.modules(unmatched)
        idle = {
            at: [member.name for member in structure.idle if at in index.distances(member)]
            for at in unmatched
        }
        known = _known_names(structure)
        # suggestions are for those that a report shows
        with few_suggestions():
            for at in sorted(unmatched, key=lambda at: unmatched[at].location.place):
                rule = unmatched[at]
                what, hint = _why_unmatched(structure, rule, idle[at], uncalled[at], known)
                yield Finding("QR301", f"{describe(rule)} {what}", rule.location, hint=hint)


def _may_be_unused(rule: Rule) -> bool:
    if rule.tier == "module_type":
        return is_module_type(rule.key)
    if rule.tier == "function":
        return function_family(rule.key) is not None
    return rule.tier == "global"


def _why_unmatched(
    structure: ModelStructure,
    rule: Rule,
    idle: Sequence[str],
    uncalled: Sequence[str],
    known: Mapping[str, list[str]],
) -> tuple[str, str]:
    """Why a rule covers no site, and what to do about it."""
    if idle:
        why = (
            f"names {listed(idle)}, which does nothing outside training or only computes with "
            "stored tensors, and so has no site"
        )
        return why, _REMOVE_RULE
    outside = [path for path in uncalled if not structure.is_traced(path)]
    if outside:
        why = f"names {listed(outside)}, which is outside fx.roots"
        return why, "add the part to fx.roots, or remove the rule"
    if uncalled:
        return (
            f"names {listed(uncalled)}, where nothing is called that can be quantized",
            _REMOVE_RULE,
        )
    hint = "`qrecipe plan` lists the names; mark a rule for other models optional = true"
    candidates = _meant(rule, known[rule.tier])
    if candidates:
        hint = f"did you mean {' or '.join(map(quoted, candidates))}?"
    return "matches nothing in this model", hint


_REMOVE_RULE = "remove the rule, or mark it optional = true"


def _meant(rule: Rule, known: Sequence[str]) -> list[str]:
    """The keys that a misspelled one may mean: the nearest names, or a glob of the nearest one."""
    names = nearest(rule.key, known, count=3)
    if rule.tier != "module_name":
        return names
    spelled = ((_spelled_like(rule.key, name), name) for name in names)
    globs = [glob for glob, name in spelled if glob and NamePatterns([glob]).matching(name)]
    return globs[:1] or [literal(name) for name in names]


def _spelled_like(glob: str, name: str) -> str | None:
    """The glob with its exact parts as in the name; None if their parts do not correspond."""
    parts, own = glob.split("."), name.split(".")
    if is_exact(glob) or len(parts) != len(own):
        return None
    pairs = zip(parts, own, strict=True)
    return ".".join(literal(other) if is_exact(part) else part for part, other in pairs)


def _known_names(structure: ModelStructure) -> dict[str, list[str]]:
    """What the keys of each tier may name."""
    members = [member for operation in structure.operations for member in operation.members]
    names = [*(member.name for member in members), *structure.modules, *structure.aliases]
    return {
        "module_name": list(dict.fromkeys(names)),
        "module_type": sorted({name for types in structure.modules.values() for name in types}),
        "function": sorted({name for member in members for name in member.functions}),
    }


def describe(rule: WrittenRule) -> str:
    """A rule as written in the recipe: ``module_name "layer1.*"``."""
    return "global" if rule.tier == "global" else f"{rule.tier} {quoted(rule.key)}"


def rules_for(names: Sequence[str]) -> str:
    """The first quoted keys of ``module_name`` rules for these sites or modules."""
    return listed([quoted(literal(name)) for name in names])


def fused(members: Sequence[str], groups: Sequence[str]) -> str:
    """Members of fused groups in words: ``bn1, a member of the fused group conv1``."""
    are = "a member" if len(members) == 1 else "members"
    of = "the fused group" if len(groups) == 1 else "the fused groups"
    return f"{listed(members)}, {are} of {of} {listed(groups)}"


def quoted(name: str) -> str:
    return f'"{name}"'


def listed(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    if not names:
        return "none"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
