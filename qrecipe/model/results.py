"""Tuples of results that are read as a whole, as by ``torch.cat(x.chunk(2, 1))``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qrecipe.model.addresses import site_of
from qrecipe.model.changes import gives_tuple
from qrecipe.model.trace_proof import Value
from qrecipe.model.tracer import OTHER_SHAPES

_JOINS = (torch.cat, torch.stack)
_CHUNKS = ("chunk", "unsafe_chunk")
_SECTIONS = ("tensor_split", "hsplit", "vsplit", "dsplit")


def read_one_by_one(node: fx.Node) -> None:
    """Let readers of the tuple read each result, in place, where their number cannot change."""
    # where Python iterates over the results, the graph asserts how many there are
    is_asserted = any(user.target is len for user in node.users)
    number = node.meta["value"].count if is_asserted else _number(node)
    slices = (user for user in node.users if user.target is operator.getitem)
    parts = [user for user in slices if isinstance(user.args[1], slice)]
    readers = [user for each in (node, *parts) for user in each.users if user not in parts]
    whole = [user for user in readers if not is_single_result(user) and user.target is not len]
    if number is None or not all(user.target in _JOINS or user.op == "output" for user in whole):
        return
    _ask_for_size(node, number)
    if not whole and not parts:
        return
    results = [_result(node, index) for index in range(number)]
    tuples = {node: tuple(results)}
    for part in parts:
        key: Any = part.args[1]
        tuples[part] = tuple(results[key])
    for user in whole:
        given: Any = fx.map_arg((user.args, user.kwargs), lambda each: tuples.get(each, each))
        user.args, user.kwargs = given
    for part in parts:
        for user in list(part.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(tuples[part][index])
            node.graph.erase_node(user)
        node.graph.erase_node(part)


def chunk_of(chunks: Sequence[torch.Tensor], index: int, site: str) -> torch.Tensor:
    """One of the chunks that a site gives; of a small input, they are fewer than it is asked for.

    Raises ``AssertionError`` if there is none, as the graph does for other shapes.
    """
    if index >= len(chunks):
        raise AssertionError(
            f"{OTHER_SHAPES}: {site} gives {len(chunks)} chunks, and the graph reads another one; "
            "quantize the model with such an input"
        )
    return chunks[index]


def expect_chunks(graph_module: fx.GraphModule) -> None:
    """Let chunks be read by `chunk_of`, in place."""
    for node in graph_module.graph.nodes:
        source: Any = node.args[0] if is_single_result(node) else None
        if source is None or not gives_tuple(source) or _name(source) not in _CHUNKS:
            continue
        if node.args[1] >= 0:
            node.target, node.args = chunk_of, (*node.args, site_of(source) or source.name)


def number_of_parts(size: int, step: int | Sequence[int] | None) -> int:
    """How many parts ``split`` gives of a dimension, or ``unbind``, which has no step."""
    if isinstance(step, Sequence):
        return len(step)
    return size if step is None else max(1, -(-size // step))


def number_of_sections(asked: int | Sequence[int]) -> int:
    """How many parts ``chunk`` or ``tensor_split`` is asked for, or where it cuts."""
    return len(asked) + 1 if isinstance(asked, Sequence) else asked


def _ask_for_size(node: fx.Node, number: int) -> None:
    """Let the number of results be computed from the size, which costs nothing to read."""
    source, (asked, dim) = node.args[0], _asked(node)
    for user in list(node.users):
        if user.target is not len:
            continue
        with node.graph.inserting_before(user):
            if _number(node) is not None:
                found = node.graph.call_function(int, (number,))
            elif _name(node) in (*_CHUNKS, *_SECTIONS):
                found = node.graph.call_function(number_of_sections, (asked,))
            else:
                step = None if _name(node) == "unbind" else asked
                size = node.graph.call_method("size", (source, dim))
                size.meta["value"] = user.meta["value"]
                found = node.graph.call_function(number_of_parts, (size, step))
        found.meta["value"] = user.meta["value"]
        user.replace_all_uses_with(found)
        node.graph.erase_node(user)


def _result(node: fx.Node, index: int) -> fx.Node:
    source: Any = node.args[0]
    rank = source.meta["value"].rank
    if rank is not None and _name(node) == "unbind":
        rank -= 1
    with node.graph.inserting_after(node):
        result = node.graph.call_function(operator.getitem, (node, index))
    result.meta["value"] = Value(True, True, rank)
    return result


def is_single_result(user: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return user.target is operator.getitem and isinstance(user.args[1], int)


def _number(node: fx.Node) -> int | None:
    """How many results a call gives for an input of any size; None if that is not known.

    Chunks may be fewer for a small input, which then fails; a batch, however, may be small.
    """
    asked, dim = _asked(node)
    if _name(node) in _CHUNKS:
        found: int | None = node.meta["value"].count
        return found if asked == found and dim != 0 else None
    is_list = isinstance(asked, (tuple, list))
    if _name(node) in _SECTIONS and (is_list or isinstance(asked, int)):
        return len(asked) + 1 if is_list else int(asked)
    return len(asked) if is_list else None


def _asked(node: fx.Node) -> tuple[Any, Any]:
    """The parts that a call asks for, if it does, and the dimension."""
    given = [*node.args[1:], *(node.kwargs[name] for name in node.kwargs if name != "dim")]
    if _name(node) == "unbind":
        given.insert(0, None)
    return given[0], node.kwargs.get("dim", given[1] if len(given) > 1 else 0)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
