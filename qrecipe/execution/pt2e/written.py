"""Operators that write into a tensor, whose readers must read what it has become.

``x[:, 0] = y`` is exported as a view of a copy, into which an operator writes. What reads the copy
afterwards names the copy itself, and an observer there would round it before it is written to.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload


def read_what_was_written(graph: fx.Graph) -> None:
    """Give each tensor that is written to a new name afterwards, in place."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node, index in list(place.items()):
        if not _writes(node):
            continue
        owner = _owner(node.all_input_nodes[0], place)
        with graph.inserting_after(node):
            now = graph.call_function(torch.ops.aten.alias.default, (owner,))
        now.meta = dict(owner.meta)
        for user in [user for user in owner.users if place.get(user, 0) > index]:
            user.replace_input_with(owner, now)


def _writes(node: fx.Node) -> bool:
    """Whether an operator writes into its first input."""
    first = _first_argument(node)
    return first is not None and first.is_write


def _owner(node: fx.Node, place: dict[fx.Node, int]) -> fx.Node:
    """What a view is taken from, at first or after it was last written to."""
    while node in place and _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether an operator returns memory of its first input, or a part of it."""
    return node.target is operator.getitem or _first_argument(node) is not None


def _first_argument(node: fx.Node) -> Any:
    """What torch says of the memory of an operator's first argument, if the result may share it."""
    arguments = node.target._schema.arguments if isinstance(node.target, OpOverload) else ()
    return arguments[0].alias_info if arguments else None
