"""Operations whose result is a divisor: rounded to 0, it would make the quotient explode."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.plan import Plan, Site

_PRODUCTS = ("matmul", "bmm")


def divisors(plan: Plan, inventory: Inventory) -> frozenset[str]:
    """The static sites whose integers become a divisor, moved or with a constant added at most.

    An attention without softmax divides by a sum of products, some of which are close to 0. If such
    a site is a product, the products that it reads are included, since their errors add up.
    """
    sites = {site.name: site for site in plan.sites}
    divided_by = [
        _divisor(node)
        for match in inventory.matches.values()
        if match.operation.op == "div"
        for node in match.nodes
    ]
    found = {name for value in divided_by if (name := _origin(value, sites))}
    left = list(found)
    while left:
        match = inventory.matches[left.pop()]
        if match.operation.op in _PRODUCTS:
            read = {_origin(value, sites) for value in match.nodes[0].all_input_nodes}
            more = {name for name in read if name and sites[name].op in _PRODUCTS} - found
            found |= more
            left += more
    return frozenset(found)


def _divisor(node: fx.Node) -> object:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("other")


def _origin(value: object, sites: Mapping[str, Site]) -> str | None:
    """The static site whose integers a value has, if any."""
    while isinstance(value, fx.Node):
        site = sites.get(value.meta.get("site", ""))
        if site is not None and site.verdict == "quantized":
            return site.name if site.mode == "static" else None
        if len(value.all_input_nodes) != 1 or not (site is None or _keeps_sizes(site)):
            return None
        value = value.all_input_nodes[0]
    return None


def _keeps_sizes(site: Site) -> bool:
    """Whether small values stay small; the sum of many, or a square root, is larger."""
    return site.verdict == "passthrough" or site.op in ("add", "clamp", "abs")
