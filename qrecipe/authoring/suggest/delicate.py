"""Operations that int8 would ruin or slow down: divisors, residual sums, readers of floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from torch import fx

from qrecipe.model.addresses import SITE
from qrecipe.model.graph_sites import Inventory, Match, readers_of
from qrecipe.planning.plan import Plan, Site

_PRODUCTS = ("matmul", "bmm")
_ELEMENTWISE = ("add", "mul")


def divisors(plan: Plan, inventory: Inventory) -> frozenset[str]:
    """The static sites whose integers become a divisor, moved or with a constant added at most.

    An attention without softmax divides by a sum of products, some of which are close to 0. If such
    a site is a product, the products that it reads are included, since their errors add up.
    """
    sites = {site.name: site for site in plan.sites}
    divided_by = [
        _divisor(node, match.operation.op)
        for match in inventory.matches.values()
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


_DIVISORS = {
    "div": (1, "other"),
    **dict.fromkeys(("reciprocal", "rsqrt"), (0, "input")),
    "addcdiv": (2, "tensor2"),
}
"""The position and the name of what operations divide by."""


def _divisor(node: fx.Node, op: str) -> object:
    """What a call divides by, if it does; a negative power is a quotient, too."""
    if op == "pow":
        exponent = _argument(node, 1, "exponent")
        is_negative = isinstance(exponent, (int, float)) and exponent < 0
        return _argument(node, 0, "input") if is_negative else None
    return _argument(node, *_DIVISORS[op]) if op in _DIVISORS else None


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


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


_WITH_A_KERNEL = ("LayerNorm", "layer_norm")
_BLOCK = 32
"""The numbers that the int8 kernel computes at once; it computes the rest one by one."""

NORMS = (*_WITH_A_KERNEL, "RMSNorm", "rms_norm")


def residual_sums(plan: Plan, inventory: Inventory) -> frozenset[str]:
    """The static sums that a LayerNorm or RMSNorm reads, directly or after moves and dropouts."""
    sums = (site for site in plan.sites if site.mode == "static" and site.op == "add")
    return frozenset(
        site.name
        for site in sums
        if any(_is_normed(node, plan) for node in inventory.matches[site.name].nodes[-1:])
    )


def fed_by_floats(plan: Plan, inventory: Inventory) -> frozenset[str]:
    """The static sites without weights whose inputs are float, or would be without such sites.

    An input smaller than the result, such as the gate of a product, may be of integers: it costs
    next to nothing to dequantize.
    """
    integers, found = set[str](), set[str]()
    for site in plan.sites:
        match = inventory.matches[site.name]
        producers = match.operation.producers
        reads_integers = any(
            name in integers and not _is_spread(inventory.matches[name], match)
            for name in producers
        )
        if site.verdict == "passthrough":
            if reads_integers:
                integers.add(site.name)
        elif site.mode == "static" and not match.has_weights and not reads_integers:
            found.add(site.name)
        elif site.gives_integers:
            integers.add(site.name)
    return frozenset(found)


def _is_spread(producer: Match, reader: Match) -> bool:
    """Whether a result is repeated over that of an elementwise operation."""
    if reader.operation.op.partition("+")[0] not in _ELEMENTWISE:
        return False
    small, large = (_numbers(match.nodes[-1]) for match in (producer, reader))
    return small is not None and large is not None and small < large


def _numbers(node: fx.Node) -> int | None:
    """How many numbers a result has for the example, if that is known."""
    shape = getattr(node.meta.get("value"), "shape", None)
    return None if shape is None else prod(shape)


def slow_norms(plan: Plan, inventory: Inventory) -> frozenset[str]:
    """The static LayerNorms that are faster in float even if they read integers."""
    return frozenset(
        site.name for site in _norms(plan) if _is_slow(inventory.matches[site.name], plan)
    )


def _norms(plan: Plan) -> Iterator[Site]:
    """The static norms that have an int8 kernel."""
    return (site for site in plan.sites if site.mode == "static" and site.op in _WITH_A_KERNEL)


def _is_slow(norm: Match, plan: Plan) -> bool:
    return _features(norm) % _BLOCK != 0 or not _gives_integers(norm.nodes[-1], plan)


def _features(match: Match) -> int:
    """How many numbers a LayerNorm norms together; 0 if that is not known."""
    shape = getattr(match.module, "normalized_shape", None)
    if shape is None:
        shape = _argument(match.nodes[0], 1, "normalized_shape")
    sizes = shape if isinstance(shape, Sequence) else (shape,)
    return prod(each if isinstance(each, int) else 0 for each in sizes)


def _is_normed(node: fx.Node, plan: Plan) -> bool:
    """Whether a norm reads the result of a node."""
    return any(site.op in NORMS for site in _readers(node, plan))


def _gives_integers(node: fx.Node, plan: Plan) -> bool:
    """Whether an int8 kernel reads the result of a node."""
    readers = _readers(node, plan)
    return any(site.verdict == "quantized" and site.mode == "static" for site in readers)


def _readers(node: fx.Node, plan: Plan) -> Iterator[Site]:
    """The sites that read the result of a node, directly or after moves."""
    sites = {site.name: site for site in plan.sites}
    left, seen = [node], set[fx.Node]()
    while left:
        for reader in readers_of(left.pop()):
            site = sites.get(reader.meta.get(SITE, ""))
            if site is None or reader in seen:
                continue
            seen.add(reader)
            yield site
            if site.verdict == "passthrough":
                left.append(reader)
