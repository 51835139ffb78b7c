"""The graph of an exported program, written as a symbolic trace would write it.

torch's own modules are called as a whole, and functions are those of torch.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from qrecipe.errors.findings import Finding, TraceError
from qrecipe.model.call import signature_of
from qrecipe.model.changes import spell_out_changes
from qrecipe.model.class_names import is_leaf
from qrecipe.model.graph_names import rename_taken
from qrecipe.model.nested import Packing
from qrecipe.model.nodes import stored
from qrecipe.model.scaled_input import ScaledLinear
from qrecipe.model.trace import Scopes
from qrecipe.recipe.schema import FxTable
from qrecipe.registry.builtin import function_family
from qrecipe.rules.structure import joined


class ProgramWriter:
    """Writes a program as the graph of ``root``."""

    def __init__(
        self,
        root: nn.Module,
        path: str,
        table: FxTable,
        given: Mapping[str, Any],
        fixed: Collection[str],
    ) -> None:
        self._root, self._path, self._table = root, path, table
        self._given, self._fixed = given, fixed
        parameters = signature_of(root).parameters
        self._defaults = {name: parameters[name].default for name in given}
        named = list(root.named_modules(remove_duplicate=False))
        self._first_name = {module: name for name, module in reversed(named)}
        self._graph = fx.Graph()
        self._written: dict[fx.Node, Any] = {}
        self._scopes: dict[str, tuple[str, type]] = {}

    def written(self, program: fx.GraphModule) -> tuple[fx.GraphModule, Scopes]:
        calls = self._calls(program)
        self._take_inputs(program.graph.find_nodes(op="placeholder"))
        for node in program.graph.nodes:
            if node.op == "get_attr":
                self._take_stored(node)
            elif node in calls:
                self._note(node, calls[node]())
            elif node.op == "call_function" and node not in self._inside and not _asserts(node):
                self._take_call(node)
        spec = program.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        leaves = fx.map_arg(tuple(program.graph.output_node().args[0]), self._written.__getitem__)  # type: ignore[arg-type]
        self._graph.output(self._packed(pytree.tree_unflatten(leaves, spec)))
        rename_taken(self._graph, self._root)
        graph_module = fx.GraphModule(self._root, self._graph)
        if spell_out_changes(graph_module, self._scopes) | self._graph.eliminate_dead_code():
            graph_module.recompile()
        return graph_module, self._scopes

    def _take_inputs(self, flat: Sequence[fx.Node]) -> None:
        nodes = iter(flat)
        for name, value in self._given.items():
            source = self._graph.placeholder(name, default_value=self._defaults[name])
            if name in self._fixed:
                self._assert_same(source, name, value)
            for keys, _ in pytree.tree_flatten_with_path(value)[0]:
                self._written[next(nodes)] = self._item(source, keys)

    def _assert_same(self, source: fx.Node, name: str, value: Any) -> None:
        same = operator.is_ if value is None else operator.eq
        message = f"{name} was {value!r} in the example inputs, and the model is traced for that"
        is_same = self._graph.call_function(same, (source, value))
        self._graph.call_function(torch._assert, (is_same, message))

    def _item(self, source: Any, keys: Sequence[Any]) -> Any:
        for key in keys:
            if isinstance(key, pytree.GetAttrKey):
                source = self._graph.call_function(getattr, (source, key.name))
            else:
                at = key.idx if isinstance(key, pytree.SequenceKey) else key.key
                source = self._graph.call_function(operator.getitem, (source, at))
        return source

    def _take_stored(self, node: fx.Node) -> None:
        target = str(node.target)
        try:
            is_known = attrgetter(target)(self._root) is not None
        except AttributeError:
            is_known = False
        if not is_known:
            target = target.replace(".", "_")
            self._root.register_buffer(target, stored(node).detach())
        self._written[node] = self._graph.get_attr(target)

    def _take_call(self, node: fx.Node) -> None:
        op, target = _as_torchs(node)
        args, kwargs = (
            fx.map_arg(each, self._written.__getitem__) for each in (node.args, node.kwargs)
        )
        self._note(node, self._graph.create_node(op, target, args, kwargs))  # type: ignore[arg-type]

    def _note(self, node: fx.Node, written: fx.Node) -> None:
        self._written[node] = written
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        module = self._module(path) or self._root
        self._scopes[written.name] = (self._first_name[module], type(module))

    def _module(self, path: str) -> nn.Module | None:
        """The module that torch.export names; None for slices of containers and the like."""
        try:
            return self._root.get_submodule(path)
        except AttributeError:
            return None

    def _packed(self, value: Any) -> Any:
        """A result as an argument of a node; containers of other classes are built by a call."""
        if type(value) in (tuple, list):
            return type(value)(map(self._packed, value))
        if type(value) is dict:
            return {key: self._packed(item) for key, item in value.items()}
        if value is None or isinstance(value, (fx.Node, bool, int, float, str)):
            return value
        packing = Packing(value, lambda leaf: isinstance(leaf, fx.Node))
        return self._graph.call_function(packing, tuple(packing.open_leaves))

    def _calls(self, program: fx.GraphModule) -> dict[fx.Node, Callable[[], fx.Node]]:
        """What stands for several operators in a trace, by the last of them."""
        modules: dict[str, tuple[str, list[fx.Node]]] = {}
        indexings: dict[Any, list[fx.Node]] = {}
        for node in program.graph.nodes:
            leaf = self._leaf(node)
            if leaf is not None:
                modules.setdefault(leaf[0], (leaf[1], []))[1].append(node)
            elif node.target in _INDEXING:
                call, function = node.meta.get("torch_fn", ("", ""))
                if str(function).endswith("__getitem__"):
                    indexings.setdefault(call, []).append(node)
        self._inside: set[fx.Node] = set()
        calls: dict[fx.Node, Callable[[], fx.Node]] = {}
        for path, nodes in modules.values():
            module = self._root.get_submodule(path)
            own = set(map(id, chain(module.parameters(), module.buffers())))
            ends = _ends(nodes, lambda node, own=own: self._reads(own, node))  # type: ignore[misc]
            if ends is not None:
                calls[ends[1]] = partial(self._call_module, path, ends[0])
                self._inside.update(nodes)
            elif joined(self._path, path) in self._table.non_traceable_module_name:
                message = f'"{path}" cannot be kept whole: it takes or gives several tensors'
                raise TraceError(Finding("QR305", message))
        for nodes in indexings.values():
            ends = _ends(nodes, lambda node: not isinstance(node.meta["val"], Tensor))
            if ends is not None:
                calls[ends[1]] = partial(self._index, nodes, ends[0])
                self._inside.update(nodes)
        return calls

    def _call_module(self, path: str, source: fx.Node) -> fx.Node:
        return self._graph.call_module(path, (self._written[source],))

    def _index(self, nodes: Sequence[fx.Node], source: fx.Node) -> fx.Node:
        """``x[:, 0]`` and its like, of which each part is an operator."""
        items: list[Any] = []
        for node in nodes:
            found: Any = fx.map_arg(node.args[1:], self._written.__getitem__)
            dimension, *rest = found
            while sum(not isinstance(item, (int, fx.Node)) for item in items) < dimension:
                items.append(slice(None))
            items.append(_INDEXING[node.target](*rest))
        return self._graph.call_function(operator.getitem, (self._written[source], tuple(items)))

    def _reads(self, own: Collection[int], node: fx.Node) -> bool:
        """Whether a node is one of a module's own tensors."""
        try:
            return node.op == "get_attr" and id(attrgetter(str(node.target))(self._root)) in own
        except AttributeError:
            return False

    def _leaf(self, node: fx.Node) -> tuple[str, str] | None:
        """The outermost module around a node that a trace calls as a whole: its call and path."""
        if node.op != "call_function" or _asserts(node):
            return None
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            module = self._module(path)
            if not path or module is None:
                continue
            is_scaled = isinstance(module, ScaledLinear)
            if is_scaled or is_leaf(joined(self._path, path), module, self._table):
                return key, self._first_name[module]
        return None


def _ends(
    nodes: Collection[fx.Node], is_own: Callable[[fx.Node], bool]
) -> tuple[fx.Node, fx.Node] | None:
    """The only input and the only result of some operators; None if there are several."""
    sources = {
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in nodes and not is_own(source)
    }
    last = [node for node in nodes if any(user not in nodes for user in node.users)]
    return (sources.pop(), last[0]) if len(sources) == len(last) == 1 else None


def _sliced(start: Any = None, end: Any = None, step: Any = 1) -> slice:
    is_whole = isinstance(end, int) and end == sys.maxsize
    return slice(start or None, None if is_whole else end, None if step == 1 else step)


_aten: Any = torch.ops.aten
_INDEXING: Mapping[Any, Callable[..., Any]] = {
    _aten.slice.Tensor: _sliced,
    _aten.select.int: lambda index: index,
    _aten.unsqueeze.default: lambda: None,
}
"""Operators that indexing becomes, with what stands in the brackets."""


def _asserts(node: fx.Node) -> bool:
    """Whether a node only checks what the proof of the graph checks as well."""
    return str(node.target).startswith(("aten._assert", "aten.sym_constrain"))


def _as_torchs(node: fx.Node) -> tuple[str, Any]:
    """The function or method of torch that rules and backends know, or the operator itself."""
    operation: Any = node.target
    if isinstance(operation, OpOverload) and operation.namespace == "aten":
        name = operation._schema.name.partition("::")[2]
        for namespace in (torch, F):
            function = getattr(namespace, name, None)
            if function_family(f"{namespace.__name__}.{name}") and _takes(function, node):
                return "call_function", function
        if function_family(f"torch.Tensor.{name}") and _takes(getattr(Tensor, name, None), node):
            return "call_method", name
    return "call_function", operation


def _takes(function: Any, node: fx.Node) -> bool:
    """Whether a function takes the arguments of the operator, tried on tensors without values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    try:
        result = function(*args, **kwargs)
    except Exception:
        return False
    return bool(_form(result) == _form(node.meta["val"]))


def _form(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: (x.dtype, len(x.shape)), value)
