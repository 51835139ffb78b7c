"""In-place operations of float graphs: who reads their results, and how to do without them."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx

from qrecipe.model.nodes import module_of

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
)


def without_changes_in_place(graph_module: fx.GraphModule) -> None:
    """Make all operations out of place; modules and graph must be our own.

    The inventory has already made readers of a changed tensor read the changing operation.
    """
    for module in graph_module.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for node in list(graph_module.graph.nodes):
        _unset_inplace(node)
        if is_in_place(node):
            changed = node.args[0]
            with graph_module.graph.inserting_before(node):
                copy = graph_module.graph.call_function(torch.clone, (changed,))
            copy.meta = {key: changed.meta[key] for key in ("value",) if key in changed.meta}
            node.replace_input_with(changed, copy)
    graph_module.recompile()


def _unset_inplace(node: fx.Node) -> None:
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.op == "call_function" and any(argument is True for argument in node.args):
        try:
            names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        except ValueError:
            return  # a builtin: it has no argument of that name
        if "inplace" in names[: len(node.args)]:
            position = names.index("inplace")
            node.args = (*node.args[:position], False, *node.args[position + 1 :])


def is_in_place(node: fx.Node) -> bool:
    """Whether the node changes the tensor that is its first argument."""
    if not node.op.startswith("call_") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    if node.kwargs.get("inplace") or node.target in _IN_PLACE_OPERATORS:
        return True
    target: Any = node.target
    if getattr(target, "__module__", "") == "_operator":  # operator.is_, operator.or_
        return False
    name = str(target if node.op == "call_method" else getattr(target, "__name__", ""))
    return name.endswith("_") and not name.endswith("__")
