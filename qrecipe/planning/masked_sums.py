"""Sums that a mask enters: numbers so low that they take the whole range of an int8 tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

from torch import Tensor, fx

from qrecipe.errors.findings import Finding
from qrecipe.errors.text import counted
from qrecipe.model.addresses import SITE
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.masks import LOWEST
from qrecipe.model.moving import arguments, last_name, moved, moves
from qrecipe.model.nodes import stored
from qrecipe.planning.plan import Site
from qrecipe.recipe.patterns import leave_float
from qrecipe.rules.resolution import listed

_SUMS_AND_CHOICES = ("where", "add", "minimum", "maximum", "to", "type_as", "float")
"""Operations whose result contains a constant that any of their inputs is."""


def mask_findings(sums: Sequence[str]) -> Iterator[Finding]:
    """A warning (QR237) about sums whose range a mask takes, if there are any."""
    if sums:
        yield mask_finding(sums, f"{leave_float(sums[0])}; or use masked_fill instead of a sum")


def mask_finding(sums: Sequence[str], hint: str) -> Finding:
    """The warning (QR237) about these sums."""
    what = f"a mask, with numbers below {LOWEST:.0f}, takes the range of"
    return Finding("QR237", f"{what} {counted(len(sums), 'int8 sum')}: {listed(sums)}", hint=hint)


def int8_sums(sites: Iterable[Site]) -> tuple[str, ...]:
    """The static sums."""
    static = (each for each in sites if each.mode == "static" and each.verdict == "quantized")
    return tuple(each.name for each in static if each.op.partition("+")[0] == "add")


def masked_sums(sites: Sequence[Site], inventory: Inventory) -> tuple[str, ...]:
    """The static sums that a number below -1000 enters: a constant, or with the example inputs."""
    static = {site.name for site in sites if site.mode == "static" and site.verdict == "quantized"}
    return tuple(
        site.name
        for site in sites
        if site.name in static
        for node in inventory.matches[site.name].nodes[:1]
        if _op(node) == "add" and (_is_masked(node) or _has_constant(node, static))
    )


def _is_masked(node: fx.Node) -> bool:
    return "value" in node.meta and bool(node.meta["value"].is_masked)


def _has_constant(node: fx.Node, static: Set[str]) -> bool:
    return any(_lowest(each, static) < LOWEST for each in node.args[:2])


def _lowest(value: object, static: Set[str]) -> float:
    """The lowest constant that enters a value, 0 if none is known."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return 0.0
    if value.op == "get_attr":
        assert value.graph.owning_module is not None
        tensor = stored(value)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
            return 0.0
        return float(tensor.detach().to_dense().min())
    op = _op(value)
    if op == "mul" and static.isdisjoint(map(_site, value.all_input_nodes)):
        # a mask of zeros and ones, times a number
        numbers = [each for each in value.args if not isinstance(each, fx.Node)]
        return min((_lowest(each, static) for each in numbers), default=0.0)
    if value.target is moved and last_name(value) == "masked_fill":
        return min(_lowest(each, static) for each in (value.args[0], arguments(value)["value"]))
    if moves(value):
        return _lowest(value.args[0], static)
    if op in _SUMS_AND_CHOICES and _site(value) not in static:
        return min((_lowest(each, static) for each in value.args), default=0.0)
    return 0.0


def _site(node: fx.Node) -> str | None:
    return node.meta.get(SITE)


def _op(node: fx.Node) -> str | None:
    member = node.meta.get("member")
    return None if member is None else member.op
