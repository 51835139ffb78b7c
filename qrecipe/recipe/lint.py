"""Warnings about a recipe that need no model.

Only about what the outermost file sets itself, if it is a file: bases and published recipes may
well offer more than one recipe uses.
"""

from __future__ import annotations

from collections.abc import Iterator

from qrecipe.errors.findings import Finding
from qrecipe.errors.text import shown
from qrecipe.recipe.checks import rules_of
from qrecipe.recipe.extends import Composition
from qrecipe.recipe.patterns import NamePatterns
from qrecipe.recipe.references import is_reference
from qrecipe.recipe.schema import QConfigTable, RecipeTable, RuleTable

_LONGEST_PROBED = 60
"""The longest pattern that is checked for matching everything."""

_PROBES = ("a", "_", "0", "fc", "layer12", "Backbone_q7")
"""Names that only a pattern that matches every name matches all of."""


def doubtful_findings(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    """The warnings about a valid recipe; ``table`` has its merged values."""
    if is_reference(recipe.top.name):
        return
    yield from _unused(recipe, table)
    yield from _rules_for_everything(recipe)


def _unused(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    """Qconfigs (QR214) and tensors (QR215) that no rule uses."""
    rules = [rule for _, rule in rules_of(table)]
    used = {rule.qconfig for rule in rules}
    for name in recipe.top.table.qconfig:
        if name not in used:
            message = f"no rule uses the qconfig {shown(name)}"
            at = recipe.top.key(("qconfig", name))
            yield Finding("QR214", message, at, "remove it, or name it in a rule")
    qconfigs = [qconfig for name, qconfig in table.qconfig.items() if name in used]
    reached = {name for names in (*map(_roles, rules), *map(_roles, qconfigs)) for name in names}
    namers = {
        name: qconfig for qconfig, use in reversed(table.qconfig.items()) for name in _roles(use)
    }
    for name in recipe.top.table.tensor:
        if name not in reached:
            message = f"no rule uses the tensor {shown(name)}"
            hint = "remove it, or name it in a qconfig or a rule"
            if name in namers:
                hint = f"only the qconfig {shown(namers[name])} uses it, which no rule uses"
            yield Finding("QR215", message, recipe.top.key(("tensor", name)), hint)


def _roles(each: QConfigTable | RuleTable) -> tuple[str | None, str | None]:
    return each.weight, each.activation


def _rules_for_everything(recipe: Composition) -> Iterator[Finding]:
    for key in recipe.top.table.rules.module_name:
        is_probed = "*" in key and len(key) <= _LONGEST_PROBED
        if is_probed and all(map(NamePatterns([key]).matching, _PROBES)):
            what = "matches every module, and overrides every rule by type"
            at = recipe.top.key(("rules", "module_name", key))
            message = f"module_name {shown(key)} {what}"
            yield Finding("QR216", message, at, "use rules.global for that")
