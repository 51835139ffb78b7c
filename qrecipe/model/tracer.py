"""The tracer of a model's forward, which knows what follows from shapes."""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none as assert_is_none
from torch.fx.immutable_collections import immutable_dict, immutable_list

from qrecipe._torch_fx import QuantizationTracer
from qrecipe.model.altered_modules import alteration
from qrecipe.model.call import VARIADIC
from qrecipe.model.known_values import (
    UNKNOWN,
    VARIES,
    Kind,
    KnownValues,
    is_from_shapes,
    kind_of,
)
from qrecipe.model.nested import Packing, leaves, parts_of
from qrecipe.model.opened.whole import Whole
from qrecipe.model.proxies import AskingProxy
from qrecipe.model.record import Shapes
from qrecipe.model.shapes import MOST_OPERATIONS, TOO_MANY_OPERATIONS
from qrecipe.model.untraceable import AutocastError, BatchSizeError, innermost_line
from qrecipe.process.state import random_numbers_kept, traced_alone

RETURNS_INPUT = "returns_input"
"""Marks, in a node's ``meta``, a call of a module whose forward returned its input when traced."""

OTHER_SHAPES = "inputs of other shapes than the example's"
"""How the message begins of an assertion that the graph makes of shapes."""

_AT_LINE = re.compile(r" \(at [^\n]*`; quantize it for these as well\)")
"""Where it was made."""


def at_line(line: str | None) -> str:
    """The end of the message of such an assertion: the line of the model's code, and the cure."""
    return f" (at {line}; quantize it for these as well)" if line else ""


def without_line(text: str) -> str:
    """Code or an argument without these lines: the file of the same model may be elsewhere."""
    return _AT_LINE.sub("", text)


_TAKING_SIZES = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.tensor)
"""Functions that take numbers one by one, or in a list, and do not accept proxies for them."""


class Tracer(QuantizationTracer):
    """Remembers the innermost module whose forward it was in when tracing failed.

    ``lines`` are filled with the lines that made the nodes, by name, unless they are None. With
    ``shapes``, values that follow from them are known. ``idle`` are the paths of modules whose
    forward returned its input: they are called as a whole, as they may do more in training mode.
    Modules at the paths ``whole`` are called as a whole too. ``ungraded`` are the paths of modules
    that compute with parameters that learn where gradients are off, which a graph does not show.
    """

    def __init__(self, module_names: list[str], module_classes: list[Callable[..., Any]]) -> None:
        super().__init__(module_names, module_classes)
        self.record_stack_traces = False
        self.path = ""
        self.lines: dict[str, str | None] | None = None
        self.whole: Collection[str] = ()
        self.idle: set[str] = set()
        self.ungraded: dict[str, None] = {}
        self._learnt: frozenset[str] = frozenset()
        self.shapes: Mapping[str, Shapes] | None = None
        self.kinds: dict[fx.Node, Kind] = {}
        self._known: KnownValues | None = None
        self._values: dict[tuple[fx.Node, Any], Any] = {}
        self._asking = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if torch.is_grad_enabled():
            named = root.named_parameters(remove_duplicate=False)
            self._learnt = frozenset(name for name, each in named if each.requires_grad)
        # what forward draws or writes during tracing must not affect the caller
        with traced_alone(), random_numbers_kept():
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if node.target in _TAKING_SIZES:  # else the code would wrap them in the whole process
                node.meta.pop("is_wrapped", None)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_whole = isinstance(m, Whole) or module_qualified_name in self.whole
        return is_whole or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The call of forward that is traced, with a placeholder for each named parameter.

        torch reads and patches the code object of forward. That of a decorator may only have
        ``*args``, so forward is called here by its signature, as the caller would.
        """
        forward, fixed = self.root.forward, concrete_args or {}
        if self.shapes is not None:
            self._known = KnownValues(self.root, self.graph, fixed, self.shapes)
            self._autowrap_function_ids |= set(map(id, _TAKING_SIZES))
            self._autowrap_search.append(torch)
        annotations = getattr(inspect.unwrap(root_fn), "__annotations__", {})
        positional, by_name = [], {}
        for parameter in inspect.signature(forward).parameters.values():
            if parameter.kind in VARIADIC:
                continue
            value = self._input(parameter, fixed, annotations.get(parameter.name))
            if parameter.kind is parameter.KEYWORD_ONLY:
                by_name[parameter.name] = value
            else:
                positional.append(value)

        @functools.wraps(root_fn)  # torch looks for its annotations
        def call() -> Any:
            return forward(*positional, **by_name)

        return call, []

    def _input(self, parameter: inspect.Parameter, fixed: Mapping[str, Any], kind: Any) -> Any:
        """The placeholder for a parameter; its value if that is fixed, which the graph asserts."""
        name = parameter.name
        default = () if parameter.default is parameter.empty else (parameter.default,)
        if name not in fixed:
            return self.create_proxy("placeholder", name, default, {}, type_expr=kind)
        value = fixed[name]
        given = self.create_proxy("placeholder", name, default, {}, name=f"{name}_1")
        text = f"{name} was {value} in the example inputs, and the model is traced for that"
        if value is None:
            self.create_proxy("call_function", assert_is_none, (given, text), {})
        else:
            torch._assert(given == value, text)  # type: ignore[no-untyped-call]
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        kind = kind_of(node, self.kinds)
        if kind is not None:
            self.kinds[node] = kind
        return AskingProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.asked(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if self._known is None:
            return super().iter(obj)
        with self._aside():
            is_sequence = self._known.is_sequence(obj.node)
        if not is_sequence:
            return super().iter(obj)
        return iter([obj[index] for index in range(self.asked(obj, len))])  # type: ignore[index]

    def asked(self, proxy: fx.Proxy, kind: Callable[[Any], Any]) -> Any:
        """What ``kind`` makes of a value: its length, truth or number. The graph asserts it.

        Raises ``BatchSizeError`` for what varies with the batch size, and torch's error for what
        does not follow from shapes, and in forwards of torch's: those choose between kernels that
        compute the same.
        """
        forward = type(self.root.get_submodule(self.path)).forward
        is_torchs = str(forward.__module__).startswith("torch.nn.modules.")
        if self._known is None or is_torchs:
            return super().to_bool(proxy)
        key = (proxy.node, kind)
        if key not in self._values:
            self._values[key] = self._found(proxy, kind)
        if self._values[key] is VARIES:
            raise BatchSizeError
        if self._values[key] is UNKNOWN:
            return super().to_bool(proxy)
        return self._values[key]

    def _found(self, proxy: fx.Proxy, kind: Callable[[Any], Any]) -> Any:
        assert self._known is not None
        asked = self.create_proxy("call_function", kind, (proxy,), {})
        with self._aside():
            value = self._known.of(asked.node)
        if value is not UNKNOWN and value is not VARIES and is_from_shapes(asked.node):
            where = self.path or "its forward"
            line = innermost_line(traceback.extract_stack(), self.root)
            text = f"{OTHER_SHAPES}: {where} was traced for {value} here{at_line(line)}"
            torch._assert(asked == value, text)  # type: ignore[no-untyped-call]
        return value

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Modules that are called inside run, and are not traced."""
        self._asking = True
        try:
            yield
        finally:
            self._asking = False

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu"):
            raise AutocastError
        if len(self.graph.nodes) > MOST_OPERATIONS:
            raise RuntimeError(TOO_MANY_OPERATIONS)
        node = super().create_node(*args, **kwargs)
        if self._learnt and not torch.is_grad_enabled() and self._learns(node):
            self.ungraded[self.path] = None
        if self.lines is not None:
            self.lines[node.name] = innermost_line(traceback.extract_stack(), self.root)
        return node

    def _learns(self, node: fx.Node) -> bool:
        """Whether a call computes with parameters that learn, its module's or as arguments."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return any(parameter.requires_grad for parameter in module.parameters())
        given = {each.target for each in node.all_input_nodes if each.op == "get_attr"}
        return not given.isdisjoint(self._learnt)

    def create_arg(self, a: Any) -> Any:
        """Like torch, but containers of custom classes keep their class."""
        if isinstance(a, fx.Proxy):  # torch asks for tuples first, which a shape is
            return a.node
        if _is_made_again_by_torch(a):
            return super().create_arg(a)
        packing = Packing(a, lambda leaf: isinstance(leaf, (fx.Proxy, torch.Tensor)))
        given = tuple(map(self.create_arg, packing.open_leaves))
        return self.create_node("call_function", packing, given, {})

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._asking:
            return forward(*args, **kwargs)
        outer, self.path = self.path, self.path_of_module(m)
        through = functools.partial(self._through, m, forward)
        result = super().call_module(m, through, args, kwargs)
        # not in a finally clause: after an error, the path is where it happened
        self.path = outer
        return result

    def _through(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a forward that is traced; a call of the module if that is its input."""
        count = len(self.graph.nodes)
        result = forward(*args, **kwargs)
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        does_more = len(self.graph.nodes) > count or alteration(module) is not None
        if does_more or len(given) != 1 or result is not given[0]:
            return result
        path = self.path_of_module(module)
        self.idle.add(path)
        called = self.create_proxy("call_module", path, args, kwargs)
        called.node.meta[RETURNS_INPUT] = True
        return called


def _is_made_again_by_torch(value: Any) -> bool:
    """Whether FX can rebuild an argument: a leaf or a plain container."""
    kind, parts = type(value), parts_of(value)
    if parts is None or kind in (dict, immutable_dict, list, immutable_list):
        return True
    if isinstance(value, (tuple, list)):
        # a subclass of a named tuple may have its own constructor
        is_named = hasattr(kind, "_fields") and kind.__bases__ == (tuple,)
        has_proxies = any(isinstance(leaf, fx.Proxy) for leaf in leaves(value))
        return kind is tuple or is_named or not has_proxies
    if isinstance(value, Mapping) or not is_dataclass(value) or hasattr(kind, "__post_init__"):
        return False
    is_plain = list(inspect.signature(kind).parameters) == [each.name for each in fields(value)]
    return is_plain and all(parts_of(part) is None for part in parts.values())
