"""Rules that cover sites but decide none of them."""

from __future__ import annotations

from collections.abc import Iterator

from qrecipe.errors.findings import Finding
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.references import is_reference
from qrecipe.rules.resolution import Resolution, describe, listed


def shadowed_findings(recipe: Recipe, resolution: Resolution) -> Iterator[Finding]:
    """Warnings (QR217) about fully shadowed rules of the outermost file.

    Inherited rules may be overridden, and the global rule is required.
    """
    own = recipe.ingredients[0].name
    if is_reference(own):
        return
    winners = {decision.rule for decision in resolution.decisions.values()}
    at_fault = {finding.location for finding in resolution.findings}
    for rule, names in resolution.covered.items():
        if not names or rule in winners or rule.tier == "global" or rule.location.file != own:
            continue
        if rule.location in at_fault:  # the error is enough
            continue
        deciders = dict.fromkeys(describe(resolution.decisions[name].rule) for name in names)
        yield Finding(
            "QR217",
            f"{describe(rule)} has no effect: everything it covers is decided by "
            f"{listed([*deciders])}",
            rule.location,
            hint=f"it covers {listed(names)}; remove it, or narrow the rule that decides there",
        )
