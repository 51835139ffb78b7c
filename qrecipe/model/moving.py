"""Calls that only move numbers, in any spelling, as one function: a backend needs one pattern.

torch's quantized tensors run all of them, and the integers stay the same. Its table of patterns has
one spelling of some. `restore_moves` writes a graph's calls again as they were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.addresses import FUNCTION_NAMES, SITE, site_of
from qrecipe.model.altered_modules import alteration
from qrecipe.model.changes import GIVE_SEVERAL
from qrecipe.model.integers import padded, plainly_laid_out, resampled, rolled
from qrecipe.model.nodes import module_of
from qrecipe.model.opened.windows import Merged, Windows, from_windows, into_windows
from qrecipe.model.results import chunk_of, is_single_result, read_one_by_one
from qrecipe.model.trace_proof import Value

PIECE = "piece"
"""The key in a node's ``meta`` of its number among the results of a call that gives several."""

_MOVES = GIVE_SEVERAL | frozenset(
    (
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"),
        *("reshape", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze"),
        *("expand", "broadcast_to", "repeat", "tile", "repeat_interleave"),
        *("getitem", "narrow", "select", "index_select", "diagonal"),
        *("flip", "fliplr", "flipud", "rot90", "roll", "pad", "masked_fill"),
        *("channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
        *("clone", "contiguous", "detach", "getattr"),
        *("into_windows", "from_windows"),
    )
)
"""The last parts of the dotted names of functions and methods."""

_METHOD = "torch.Tensor."
_PROPERTY = "builtins.getattr"
_NAMES = {
    **FUNCTION_NAMES,
    **{each: f"{each.__module__}.{each.__name__}" for each in (into_windows, from_windows)},
}
_FUNCTIONS = {_PROPERTY: getattr, **{name: each for each, name in _NAMES.items()}}


def moved(x: Any, call: str, given: dict[str, Any], index: int | None = None) -> Any:
    """The result of the function ``call`` for ``x``, or one of its results.

    The other arguments are ``given`` in a dict: torch observes the tensors that it finds in lists
    and tuples, sizes and indices among them.
    """
    op, target = _written(call)
    function = getattr(torch.Tensor, target) if op == "call_method" else target
    result = function(x, *given["args"], **given["kwargs"])
    return result if index is None else result[index]


_PARAMETERS = {
    "pad": ("pad", "mode", "value"),
    "masked_fill": ("mask", "value"),
    "roll": ("shifts", "dims"),
}
"""The names of the arguments that someone asks for."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that a `moved` call is given, by name."""
    given: Any = node.args[2]
    names = _PARAMETERS.get(last_name(node), ())
    return {**dict(zip(names, given["args"], strict=False)), **given["kwargs"]}


def last_name(node: fx.Node) -> str:
    """The name of the function that a `moved` call calls, without its namespace."""
    return _last(str(node.args[1]))


def averages(node: fx.Node) -> bool:
    """Whether an interpolation gives new numbers, and not only copies of the nearest ones."""
    return node.target is F.interpolate and node.kwargs.get("mode") in ("bilinear", "area")


def moves(node: fx.Node) -> bool:
    """Whether a node only moves numbers, restored or not."""
    call = _dotted(node)
    return node.target in (padded, rolled, resampled, plainly_laid_out, chunk_of) or (
        call is not None and _last(call) in _MOVES
    )


def spell_out_moves(graph_module: fx.GraphModule, patterns: Collection[Any]) -> None:
    """Make calls `moved` that are not among ``patterns`` already, in place.

    A call that gives several results becomes one call for each of them, if only single results are
    used, or their number cannot change. Nodes must have their addresses.
    """
    for node in list(graph_module.graph.nodes):
        if _last(_dotted(node) or "") in GIVE_SEVERAL:
            read_one_by_one(node)
    for node in list(graph_module.graph.nodes):
        if "member" not in node.meta or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if node.op == "call_module":
            _module_to_function(node, module_of(node), patterns)
        elif node.op == "call_method" and node.target in _LIKE_ANOTHER:
            _ask_for_size(node)
        call = _dotted(node)
        if node.target in patterns or call is None or _last(call) not in _MOVES:
            continue
        x, *args = node.args
        given = {"args": tuple(args), "kwargs": dict(node.kwargs)}
        if _last(call) in GIVE_SEVERAL:
            _take_apart(node, (x, call, given))
        elif node.meta["value"].is_tensor:
            node.op, node.target = "call_function", moved
            node.args, node.kwargs = (x, call, given), {}


_LIKE_ANOTHER = {"expand_as": "expand", "view_as": "reshape", "reshape_as": "reshape"}


def _ask_for_size(node: fx.Node) -> None:
    """Read the size of the other tensor, whose own numbers are not moved."""
    x, other = (*node.args, *node.kwargs.values())
    with node.graph.inserting_before(node):
        size = node.graph.call_method("size", (other,))
    size.meta["value"] = Value(False, False)
    node.target, node.args, node.kwargs = _LIKE_ANOTHER[str(node.target)], (x, size), {}


def _dotted(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return f"{_METHOD}{node.target}"
    if node.target is moved:
        return str(node.args[1])
    if node.target is getattr and node.args[1] in ("T", "mT", "H", "mH"):
        return _PROPERTY
    return _NAMES.get(node.target) if node.op == "call_function" else None


def _last(call: str) -> str:
    return call.rpartition(".")[2]


def _take_apart(node: fx.Node, args: tuple[Any, ...]) -> None:
    if not all(map(is_single_result, node.users)):
        return
    for user in list(node.users):
        user.meta |= {"member": node.meta["member"], PIECE: user.args[1]}
        user.target, user.args = moved, (*args, user.args[1])
    node.graph.erase_node(node)


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function, and its arguments after the first."""


def _module_to_function(node: fx.Node, module: Any, patterns: Collection[Any]) -> None:
    """Replace a module without weights by the function that it calls."""
    write = _AS_FUNCTION.get(type(module))
    if type(module) in patterns or write is None or alteration(module) is not None:
        return
    node.op, (node.target, args, node.kwargs) = "call_function", write(module)
    node.args = (*node.args, *args)


def _upsampling(module: Any) -> _Call:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    return F.interpolate, (), {name: getattr(module, name) for name in names}


def _constant_padding(module: Any) -> _Call:
    return F.pad, (module.padding, "constant", module.value), {}


_AS_FUNCTION: dict[type, Callable[[Any], _Call]] = {
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _upsampling),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _constant_padding),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _constant_padding),
    **dict.fromkeys(
        (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        lambda module: (F.pad, (module.padding, "reflect"), {}),
    ),
    nn.ChannelShuffle: lambda module: (F.channel_shuffle, (module.groups,), {}),
    nn.Unflatten: lambda module: (torch.unflatten, (module.dim, module.unflattened_size), {}),
    Windows: lambda module: (into_windows, (), {"window": module.window, "shift": module.shift}),
    Merged: lambda module: (from_windows, (), {"window": module.window, "shift": module.shift}),
}


def restore_moves(graph_module: fx.GraphModule) -> bool:
    """Undo `spell_out_moves` for functions and methods, in place; whether there were any."""
    found = [node for node in graph_module.graph.nodes if node.target is moved]
    whole: dict[tuple[Any, str | None], fx.Node] = {}
    for node in found:
        x, call, given, *_ = node.args
        if PIECE not in node.meta:
            node.op, node.target = _written(call)
            node.args, node.kwargs = (x, *given["args"]), given["kwargs"]
            continue
        key = x, site_of(node)
        if key not in whole:
            with graph_module.graph.inserting_before(node):
                whole[key] = graph_module.graph.create_node(
                    *_written(call), (x, *given["args"]), given["kwargs"]
                )
            whole[key].meta = {"value": Value(True, False)}
            if SITE in node.meta:
                whole[key].meta[SITE] = node.meta[SITE]
        node.target, node.args = operator.getitem, (whole[key], node.meta[PIECE])
    return bool(found)


def _written(call: str) -> tuple[str, Any]:
    if call.startswith(_METHOD):
        return "call_method", call.removeprefix(_METHOD)
    return "call_function", _FUNCTIONS[call]
