"""Changes in place as values: what reads a changed tensor reads what it has become.

A quantized graph computes each value anew, so that a change through a view, as in
``x[:, 0].mul_(2)``, would not reach ``x``. Therefore each change is followed to all tensors that
share the memory: what the view was taken from gets the change written back, and other views are
taken again. Later steps can do without changes: `without_changes_in_place`.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.known_values import is_from_shapes
from qrecipe.model.nodes import module_of
from qrecipe.model.proxies import IN_PLACE

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
)

GIVE_SEVERAL = frozenset(
    (
        *("chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes"),
        *("tensor_split", "hsplit", "vsplit", "dsplit", "unbind"),
    )
)
"""Methods and functions that give a tuple of parts."""

_PERMUTE = frozenset(
    (
        *("permute", "transpose", "t", "adjoint", "swapaxes", "swapdims", "movedim", "moveaxis"),
        *("expand", "expand_as", "broadcast_to", "T", "mT", "H", "mH"),
    )
)
_COPY_IF_PERMUTED = frozenset(("reshape", "reshape_as", "flatten", "ravel", "contiguous"))
_VIEWS = frozenset(
    (
        *(*GIVE_SEVERAL, *_PERMUTE, *_COPY_IF_PERMUTED, "view", "view_as", "unflatten"),
        *("squeeze", "unsqueeze", "narrow", "select", "diagonal", "unfold", "getitem"),
        *("detach", "data", "real", "to", "type_as", "float"),
    )
)
"""Calls that may return the memory of their input; the proof of the graph shows whether they do."""

_FUNCTIONS = {
    **{getattr(torch, name): name for name in _VIEWS if hasattr(torch, name)},
    operator.getitem: "getitem",
}


def setitem(x: Any, key: Any, value: Any) -> Any:
    """``x`` as it is after ``x[key] = value``."""
    x = x.clone() if isinstance(x, Tensor) else copy.copy(x)
    x[key] = value
    return x


def write_back(x: Any, part: Tensor, views: list[dict[str, Any]]) -> Any:
    """``x`` with ``part`` where these views look, each of which is a view of the one before.

    In a tuple or another container, the first view is an item.
    """
    if not isinstance(x, Tensor):
        items = dict(x) if isinstance(x, Mapping) else list(x)
        items[views[0]["args"][0]] = part
        kind: Any = type(x)
        return getattr(kind, "_make", kind)(items)
    view = x = x.clone(memory_format=torch.contiguous_format)
    for each in views:
        args, kwargs = each["args"], each["kwargs"]
        if each["name"] == "getitem":
            view = operator.getitem(view, *args)
        elif each["is_attribute"]:
            view = getattr(view, *args)
        else:
            view = getattr(view, each["name"])(*args, **kwargs)
    view.copy_(part)
    return x


def spell_out_changes(graph_module: fx.GraphModule, scopes: MutableMapping[str, Any]) -> bool:
    """Let the readers of changed tensors read what they have become, in place.

    What is inserted gets the scope of the change. Whether there are changes is returned.
    """
    memory = _Memory(scopes)
    for node in list(graph_module.graph.nodes):
        memory.read(node)
        if node.target is operator.setitem and isinstance(node.args[0], fx.Node):
            if memory.is_view(*node.args):  # x[key] += 1 has changed the view
                graph_module.graph.erase_node(node)
                continue
            node.target = setitem
            memory.change(node.args[0], node)
        elif is_in_place(node) or (
            node.meta.get(IN_PLACE) and not is_from_shapes(node.all_input_nodes[0])
        ):
            memory.change(node.args[0], node)
        elif _view(node) is not None:
            memory.view(node)
        elif node.target in _DROPOUTS or isinstance(module_of(node), _RETURN_INPUT):
            memory.rename(node)
    return memory.has_changed


_RETURN_INPUT = (nn.Identity, nn.modules.dropout._DropoutNd)
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout),
)
"""In eval mode, they return their input too."""


class _Memory:
    """What tensors have become, and which ones are views of others; by the node that came first."""

    def __init__(self, scopes: MutableMapping[str, Any]) -> None:
        self._scopes = scopes
        self._first: dict[fx.Node, fx.Node] = {}
        self._now: dict[fx.Node, fx.Node] = {}
        self._source: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}

    @property
    def has_changed(self) -> bool:
        return bool(self._now)

    def read(self, node: fx.Node) -> None:
        """Let a node read what its inputs have become."""
        for source in node.all_input_nodes:
            now = self._now.get(self._first.get(source, source), source)
            if now is not source:
                node.replace_input_with(source, now)

    def rename(self, node: fx.Node) -> None:
        """Note that a node returns its input itself."""
        read = node.all_input_nodes[0]
        self._first[node] = self._first.get(read, read)

    def view(self, node: fx.Node) -> None:
        read: Any = node.args[0]
        source = self._first.get(read, read)
        if _name(node) in _COPY_IF_PERMUTED and self._is_permuted(source):
            return
        self._source[node] = source
        self._views.setdefault(source, []).append(node)

    def is_view(self, x: fx.Node, key: Any, value: Any) -> bool:
        """Whether a value is ``x[key]`` itself."""
        view = self._first.get(value) if isinstance(value, fx.Node) else None
        if view is None or _name(view) != "getitem" or view.args[1] != key:
            return False
        return self._source.get(view) is self._first.get(x, x)

    def _is_permuted(self, node: fx.Node) -> bool:
        while node in self._source:
            if _name(node) in _PERMUTE:
                return True
            node = self._source[node]
        return False

    def change(self, changed: Any, by: fx.Node) -> None:
        """Let a tensor become the result of a node, and with it what shares its memory."""
        changed = self._first.get(changed, changed)
        self._become(changed, by)
        last = self._take_again(changed, by, by)
        while changed in self._source:
            views = [changed]
            owner = self._source[changed]
            while gives_tuple(owner) and owner in self._source:
                views.insert(0, owner)
                owner = self._source[owner]
            whole, part = self._now.get(owner, owner), self._now[changed]
            with by.graph.inserting_after(last):
                last = by.graph.call_function(write_back, (whole, part, [*map(_view, views)]))
            self._become(owner, last, by)
            last = self._take_again(owner, last, by, changed)
            changed = owner

    def _become(self, first: fx.Node, now: fx.Node, by: fx.Node | None = None) -> None:
        self._now[first] = now
        self._first[now] = first
        if by is not None and by.name in self._scopes:
            self._scopes[now.name] = self._scopes[by.name]

    def _take_again(
        self, owner: fx.Node, last: fx.Node, by: fx.Node, done: fx.Node | None = None
    ) -> fx.Node:
        """Take the views of a tensor again, except one, after a node; the last node then."""
        waiting = [*self._views.get(owner, ())]
        for view in waiting:  # grows: views of views
            if view is done:
                continue
            read: Any = view.args[0]
            with by.graph.inserting_after(last):
                last = by.graph.node_copy(view)
            last.replace_input_with(read, self._now[self._source[view]])
            self._become(view, last, by)
            waiting += self._views.get(view, ())
        return last


def gives_tuple(node: fx.Node) -> bool:
    """Whether a call gives a tuple of parts."""
    return _name(node) in GIVE_SEVERAL


def gives_parts(node: fx.Node) -> bool:
    """Whether a call gives a tuple of parts that have as many dimensions as their input."""
    return gives_tuple(node) and _name(node) != "unbind"


def _view(node: fx.Node) -> dict[str, Any] | None:
    """A call that may return the memory of its first argument; None if it does not."""
    name = _name(node)
    if name not in _VIEWS or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    args = node.args[1:]
    if name == "getitem" and _copies(args[0]):
        return None
    is_attribute = node.target is getattr
    return {"name": name, "args": args, "kwargs": node.kwargs, "is_attribute": is_attribute}


def _copies(index: Any) -> bool:
    """Whether an index has tensors or lists of numbers, as far as can be seen."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, (fx.Node, list)) for part in parts)


def _name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    if node.target is getattr:
        return str(node.args[1])
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


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
