"""Decides which rule wins for each operation.

1. ``module_name`` beats ``module_type`` and ``function``, which beat ``global``.
2. Within a tier, a rule covers what it matches and everything inside, and the rule that matches the
   nearest enclosing module wins; the operation itself is nearest.
3. Then an exact name beats a glob, and a recipe beats the ones that it extends.
4. If several rules remain and differ, they contradict each other.

A fused group is decided by its first member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qrecipe.errors.findings import Finding
from qrecipe.errors.spelling import nearest
from qrecipe.errors.text import counted
from qrecipe.recipe.patterns import NamePattern, compile_pattern, literal, selects
from qrecipe.recipe.recipe import Rule, WrittenRule
from qrecipe.registry.builtin import (
    PARAMETRIZED,
    canonical_module_type,
    function_family,
    is_module_type,
)
from qrecipe.rules.structure import Member, ModelStructure, Operation, enclosing

_TIER_RANK = {"module_name": 0, "module_type": 1, "function": 1, "global": 2}


@dataclass(frozen=True, slots=True)
class Decision:
    """The winning rule of an operation and the rules that it shadows.

    ``names_operation`` means that the winner names the operation itself: by its exact name, its
    leaf type or its function.
    """

    operation: Operation
    rule: Rule
    shadowed: tuple[Rule, ...]
    names_operation: bool


@dataclass(frozen=True, slots=True)
class Resolution:
    """The decision of each operation by name, the operations of each rule, and the findings."""

    decisions: Mapping[str, Decision]
    covered: Mapping[Rule, tuple[str, ...]]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _Claim:
    """A rule that covers an operation, through a module ``distance`` levels above it."""

    rule: Rule
    distance: int
    exact: bool

    @property
    def rank(self) -> tuple[int, int, int]:
        return (_TIER_RANK[self.rule.tier], self.distance, 0 if self.exact else 1)


@dataclass(slots=True)
class _Matcher:
    """Matches a rule's key against one model."""

    rule: Rule
    structure: ModelStructure
    names_of: Mapping[str, Sequence[str]]
    pattern: NamePattern | None = field(init=False, default=None)
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.rule.tier == "module_name":
            self.pattern = compile_pattern(self.rule.key)
        elif self.rule.tier == "module_type":
            self.key = canonical_module_type(self.rule.key)
        elif self.rule.tier == "function":
            self.key = function_family(self.rule.key) or self.rule.key

    @property
    def exact(self) -> bool:
        return self.pattern is None or self.pattern.is_exact

    def distance(self, member: Member) -> int | None:
        """How many modules are between the member and what the key matches; None for no match."""
        if self.rule.tier == "global":
            return 0
        if self.rule.tier == "function":
            return 0 if self.key in member.functions else None
        if self.rule.tier == "module_type":
            return self._nearest_scope(member, self._scope_has_type)
        if self.selects_call(member):
            return 0
        return self._nearest_scope(member, self._scope_has_name)

    def selects_call(self, member: Member) -> bool:
        """Whether the key is a name that selects this particular call."""
        if self.pattern is None:
            return False
        path = member.scopes[0]
        rest = member.name[len(path) :]
        return any(selects(self.pattern, name + rest) for name in self.names_of[path])

    def _nearest_scope(self, member: Member, matches: Callable[[str], bool]) -> int | None:
        first = 0 if member.module is not None else 1
        scopes = enumerate(member.scopes, start=first)
        return next((distance for distance, path in scopes if matches(path)), None)

    def _scope_has_type(self, path: str) -> bool:
        return self.key in self.structure.modules[path]

    def _scope_has_name(self, path: str) -> bool:
        assert self.pattern is not None
        return any(self.pattern.matches(name) for name in self.names_of[path] if name)


def resolve(structure: ModelStructure, rules: Sequence[Rule]) -> Resolution:
    """Decide every operation of a model; findings are returned, not raised."""
    names_of: dict[str, list[str]] = {path: [path] for path in structure.modules}
    for alias, path in structure.aliases.items():
        names_of[path].append(alias)
    # the result must not depend on the order of keys in a file, not even in messages
    rules = sorted(rules, key=lambda rule: (_TIER_RANK[rule.tier], rule.tier, rule.key, rule.layer))
    matchers = [_Matcher(rule, structure, names_of) for rule in rules]
    covered: dict[Rule, list[str]] = {rule: [] for rule in rules}
    decisions: dict[str, Decision] = {}
    conflicts: dict[_Conflict, list[str]] = {}
    for operation in structure.operations:
        decision, found = _decide(operation, matchers)
        decisions[operation.name] = decision
        for rule in (decision.rule, *decision.shadowed):
            covered[rule].append(operation.name)
        for conflict in found:
            conflicts.setdefault(conflict, []).append(operation.name)
    findings = [
        *_conflict_findings(conflicts),
        *_coverage_findings(structure, rules, covered),
    ]
    return Resolution(
        decisions, {rule: tuple(names) for rule, names in covered.items()}, tuple(findings)
    )


@dataclass(frozen=True, slots=True)
class _Conflict:
    """Two rules that contradict each other about an operation.

    ``member`` is the later member of the fused group that ``rival`` names, None if it names the
    operation itself.
    """

    winner: Rule
    rival: Rule
    member: str | None


def _decide(operation: Operation, matchers: Sequence[_Matcher]) -> tuple[Decision, list[_Conflict]]:
    """The decision, and the rules of equal rank that contradict it."""
    first, *others = operation.members
    claims = [
        _Claim(matcher.rule, distance, matcher.exact)
        for matcher in matchers
        if (distance := matcher.distance(first)) is not None
    ]
    claims.sort(key=lambda claim: claim.rank)
    peers = [claim.rule for claim in claims if claim.rank == claims[0].rank]
    top = [rule for rule in peers if not any(rule.layer in peer.overrides for peer in peers)]
    winner = top[0]
    claimed = {claim.rule for claim in claims}
    on_members = [
        matcher.rule
        for matcher in matchers
        if matcher.rule not in claimed
        and any(matcher.distance(member) is not None for member in others)
    ]
    shadowed = [*(claim.rule for claim in claims if claim.rule is not winner), *on_members]
    at = next(claim for claim in claims if claim.rule is winner)
    names_operation = winner.tier != "global" and at.distance == 0 and at.exact
    decision = Decision(operation, winner, tuple(shadowed), names_operation)
    equals = [_Conflict(winner, rule, None) for rule in top if rule.qconfig != winner.qconfig]
    return decision, [*equals, *_member_conflicts(winner, others, matchers)]


def _member_conflicts(
    winner: Rule, others: Sequence[Member], matchers: Sequence[_Matcher]
) -> Iterator[_Conflict]:
    """Rules that name a later member of the group and decide it differently.

    As elsewhere, the winner beats the rules of recipes that its own one extends.
    """
    for matcher in matchers:
        if matcher.rule.layer in winner.overrides:
            continue
        named = next((member.name for member in others if matcher.selects_call(member)), None)
        if named is not None and matcher.rule.qconfig != winner.qconfig:
            yield _Conflict(winner, matcher.rule, named)


def _conflict_findings(conflicts: Mapping[_Conflict, list[str]]) -> Iterator[Finding]:
    for conflict, names in conflicts.items():
        winner, rival = conflict.winner, conflict.rival
        if conflict.member is None:
            yield Finding(
                "QR304",
                f"{describe(winner)} says {winner.label} and {describe(rival)} says {rival.label} "
                f"about {listed(names)}, with equal rank",
                winner.location,
                hint="remove one of them, or add a rule with the exact name of the site",
                related=(("against", rival.location),),
            )
        else:
            yield Finding(
                "QR304",
                f"{describe(rival)} says {rival.label} about {conflict.member}, a member of the "
                f"fused group {names[0]}, which {describe(winner)} makes {winner.label}",
                rival.location,
                hint=f"a group is decided as one: write the rule for {rule_for(names[0])}",
                related=(("decided at", winner.location),),
            )


def _coverage_findings(
    structure: ModelStructure, rules: Sequence[Rule], covered: Mapping[Rule, Sequence[str]]
) -> Iterator[Finding]:
    for rule in rules:
        count = len(covered[rule])
        if rule.expect == count or (count == 0 and rule.optional):
            continue
        if count == 0 and not _may_be_unused(rule):
            yield _unmatched(structure, rule)
        elif rule.expect is not None:
            yield Finding(
                "QR302",
                f"{describe(rule)} covers {counted(count, 'site')}, not {rule.expect}: "
                f"{listed(covered[rule])}",
                rule.location,
                hint=f"write expect = {count} if that is intended",
            )


def _may_be_unused(rule: Rule) -> bool:
    if rule.tier == "module_type":
        return is_module_type(rule.key)
    if rule.tier == "function":
        return function_family(rule.key) is not None
    return rule.tier == "global"


def _unmatched(structure: ModelStructure, rule: Rule) -> Finding:
    uncalled = _uncalled_modules(structure, rule)
    outside = [path for path in uncalled if not _is_traced(structure, path)]
    if outside:
        return Finding(
            "QR301",
            f"{describe(rule)} names {listed(outside)}, which is outside fx.roots",
            rule.location,
            hint="add the part to fx.roots, or remove the rule",
        )
    if uncalled:
        return Finding(
            "QR301",
            f"{describe(rule)} names {listed(uncalled)}, where nothing is called that can be "
            "quantized",
            rule.location,
            hint="remove the rule, or mark it optional = true",
        )
    known = _known_names(structure, rule)
    write = rule_for if rule.tier == "module_name" else quoted
    candidates = nearest(rule.key, known, count=3)
    return Finding(
        "QR301",
        f"{describe(rule)} matches nothing in this model",
        rule.location,
        hint=f"did you mean {' or '.join(map(write, candidates))}?"
        if candidates
        else "`qrecipe plan` lists the names; mark a rule for other models optional = true",
    )


def subclass_findings(
    structure: ModelStructure, covered: Mapping[Rule, Sequence[str]]
) -> Iterator[Finding]:
    """Type rules that cover nothing although the model has subclasses of their type (QR209)."""
    sites = {operation.members[0].module for operation in structure.operations}
    for rule, names in covered.items():
        if names or rule.tier != "module_type":
            continue
        key = canonical_module_type(rule.key)
        paths = [
            path
            for path, bases in structure.bases.items()
            if key in bases and sites.isdisjoint(enclosing(path)[1:])  # not inside a site
        ]
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


def _is_traced(structure: ModelStructure, path: str) -> bool:
    """Whether the module at ``path`` is inside a root or contains one."""
    around = enclosing(path)
    return not structure.roots or any(
        root in around or path in enclosing(root) for root in structure.roots
    )


def _uncalled_modules(structure: ModelStructure, rule: Rule) -> list[str]:
    if rule.tier == "module_name":
        pattern = compile_pattern(rule.key)
        paths = [*structure.modules, *structure.aliases]
        return [path for path in paths if path and pattern.matches(path)]
    if rule.tier == "module_type":
        key = canonical_module_type(rule.key)
        return [path for path, types in structure.modules.items() if key in types]
    return []


def _known_names(structure: ModelStructure, rule: Rule) -> list[str]:
    members = [member for operation in structure.operations for member in operation.members]
    if rule.tier == "module_type":
        return sorted({name for types in structure.modules.values() for name in types})
    if rule.tier == "function":
        return sorted({name for member in members for name in member.functions})
    names = [*(member.name for member in members), *structure.modules, *structure.aliases]
    return list(dict.fromkeys(names))


def describe(rule: WrittenRule) -> str:
    """A rule as written in the recipe: ``module_name "layer1.*"``."""
    return "global" if rule.tier == "global" else f"{rule.tier} {quoted(rule.key)}"


def rule_for(name: str) -> str:
    """The quoted key of a ``module_name`` rule for this site or module."""
    return quoted(literal(name))


def quoted(name: str) -> str:
    return f'"{name}"'


def listed(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    if not names:
        return "none"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
