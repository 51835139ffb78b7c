"""The sums of a transformer's residual connections, which all later layers read."""

from __future__ import annotations

from torch import fx

from qrecipe.model.addresses import SITE
from qrecipe.model.graph_sites import Inventory, readers_of
from qrecipe.planning.plan import Plan

NORMS = ("LayerNorm", "layer_norm", "RMSNorm", "rms_norm")


def residual_sums(plan: Plan, inventory: Inventory) -> frozenset[str]:
    """The static sums that a LayerNorm or RMSNorm reads, behind moves and dropouts too."""
    sums = (site for site in plan.sites if site.mode == "static" and site.op == "add")
    return frozenset(
        site.name
        for site in sums
        if any(_is_normed(node, plan) for node in inventory.matches[site.name].nodes[-1:])
    )


def _is_normed(node: fx.Node, plan: Plan) -> bool:
    """Whether a norm reads the result of a node."""
    sites = {site.name: site for site in plan.sites}
    left, seen = [node], set[fx.Node]()
    while left:
        for reader in readers_of(left.pop()):
            site = sites.get(reader.meta.get(SITE, ""))
            if site is None or reader in seen:
                continue
            seen.add(reader)
            if site.op in NORMS:
                return True
            if site.verdict == "passthrough":
                left.append(reader)
    return False
