"""Calls whose results need no other range than that of their first input."""

from __future__ import annotations

from typing import Any

from torch import fx

from qrecipe.model.addresses import CALLS, DROPS
from qrecipe.model.moving import moves

_AVERAGES = ("mean", "interpolate")
_CUTS = ("relu", "relu_", "relu6")
_GIVE_ALL = frozenset(
    (
        *("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "detach"),
        *("transpose", "permute", "repeat", "repeat_interleave", "pixelshuffle", "pixelunshuffle"),
    )
)


def keeps_range(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether results lie between the extremes of the first input, or zero.

    Not a ReLU that is all that reads its input: what it cuts off needs no range.
    """
    name = _name(node, graph_module)
    if name in _CUTS:
        source = node.all_input_nodes[0]
        return DROPS in source.meta or len(source.users) > 1
    if "pool" in name:
        return not _has_divisor(node, graph_module)
    return moves(node) or name in _AVERAGES or name in _GIVE_ALL


def gives_all(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether a call that torch has a pattern for gives all numbers of its input."""
    return _name(node, graph_module) in _GIVE_ALL


def _name(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """The name of what is called if it is torch's, in lower case."""
    called: Any = node.target
    if node.op == "call_module":
        called = type(graph_module.get_submodule(str(called)))
    elif node.op == "call_method":
        return str(called)
    is_torchs = node.op in CALLS and str(called.__module__).startswith("torch")
    return str(called.__name__).lower() if is_torchs else ""


def _has_divisor(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether an average is divided by a number that is given."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return getattr(module, "divisor_override", None) is not None
    at = 6
    given = node.args[at] if len(node.args) > at else node.kwargs.get("divisor_override")
    return given is not None
