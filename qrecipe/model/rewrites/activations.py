"""Activations that are spelled out in arithmetic become calls of torch's functions, which are one.

``0.5 * x * (1 + torch.erf(x / math.sqrt(2)))`` is ``F.gelu(x)``. Eight operators read and write a
tensor eight times, and each would be rounded alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.addresses import family_of, is_floating, members_of
from qrecipe.model.altered_modules import alteration
from qrecipe.model.changes import is_in_place
from qrecipe.model.nodes import module_of
from qrecipe.process.memory import raise_lack_of_memory


@dataclass(frozen=True, slots=True)
class Activation:
    """One of torch's activations: its function, its module, and the arguments after the input."""

    function: Any
    module: nn.Module
    kwargs: Mapping[str, Any] = field(default_factory=dict)


_ACTIVATIONS = (
    Activation(F.gelu, nn.GELU("tanh"), {"approximate": "tanh"}),
    Activation(F.gelu, nn.GELU()),
    Activation(F.silu, nn.SiLU()),
    Activation(F.mish, nn.Mish()),
    Activation(F.hardswish, nn.Hardswish()),
    Activation(F.hardsigmoid, nn.Hardsigmoid()),
)

_FLOAT = (F.gelu, F.mish)
"""Those that no backend has a kernel for."""

_BENDS = frozenset(
    {
        *("tanh", "sigmoid", "erf", "erfc", "exp", "softplus", "log1p", "logsigmoid"),
        *("relu", "relu6", "hardtanh", "clamp", "hardsigmoid"),
    }
)
_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "neg", "reciprocal", "pow", "square"})
_MODULES: Mapping[Any, str] = {
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.LogSigmoid: "logsigmoid",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.Hardsigmoid: "hardsigmoid",
}
_MOST_CALLS = 16
"""A GELU has eight; neighbours that do nothing may be among them."""

_TOLERANCES = {torch.float64: 2.0**-25, torch.float32: 2.0**-20}
"""In double precision, constants of less than seven digits show; in float32, roundings add up."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """Calls that together are an activation of ``x``; in order, and read by no other call."""

    activation: Activation
    x: fx.Node
    calls: tuple[fx.Node, ...]


def activations_as_calls(graph_module: fx.GraphModule, patterns: Collection[Any]) -> None:
    """Turn spelled-out activations into calls, in place, which have the names of all their calls.

    Those that are not among the ``patterns`` of a backend stay if their parts may be there.
    """
    calls = elementwise_calls(graph_module.graph)
    number = len(calls)
    for node in reversed(list(graph_module.graph.nodes)):
        found = spelled_out(node, calls)
        if found is None or not is_floating(found.x):
            continue
        if found.activation.function in (*_FLOAT, *patterns):
            calls.difference_update(found.calls)
            _replace(found)
    if len(calls) < number:
        graph_module.recompile()


def elementwise_calls(graph: fx.Graph) -> set[fx.Node]:
    """The calls that compute each number from those at its place, and from constants."""
    return {node for node in graph.nodes if _is_elementwise(node)}


def spelled_out(last: fx.Node, elementwise: Collection[fx.Node]) -> Spelled | None:
    """The activation that a call and those before it spell out, if that is what they do.

    What they compute from numbers alone decides, and not how it is written. All of them are among
    the ``elementwise`` calls.
    """
    if last not in elementwise:
        return None
    for x, calls in _functions_of_one(last, elementwise):
        if len(calls) > 1 and any(map(_bends, calls)):
            activation = _activation(x, calls)
            if activation is not None:
                return Spelled(activation, x, calls)
    return None


def _replace(found: Spelled) -> None:
    *others, node = found.calls
    function = found.activation.function
    family = function.__name__
    names = {family, f"torch.nn.functional.{family}"}
    first, *parts = (member for call in found.calls for member in members_of(call))
    first = replace(first, op=family, functions=first.functions | names)
    node.meta |= {"member": first, "members": (first, *(replace(each, op="") for each in parts))}
    node.op, node.target = "call_function", function
    node.args, node.kwargs = (found.x,), dict(found.activation.kwargs)
    for call in reversed(others):
        call.graph.erase_node(call)


def _functions_of_one(
    last: fx.Node, elementwise: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The nodes that a call is a function of alone, nearest first, and the calls after each."""
    order = _before(last, elementwise)
    for x in order[1:]:
        calls = _between(x, last, order, elementwise)
        if calls is not None:
            yield x, calls


def _before(last: fx.Node, elementwise: Collection[fx.Node]) -> list[fx.Node]:
    """A call and the nodes that it follows from by elementwise calls, last first."""
    found = {last}
    waiting = [last]
    while waiting and len(found) <= _MOST_CALLS:
        for source in waiting.pop(0).all_input_nodes:
            if source not in found:
                found.add(source)
                waiting += [source] if source in elementwise else []
    return sorted(found, reverse=True)


def _between(
    x: fx.Node, last: fx.Node, order: list[fx.Node], elementwise: Collection[fx.Node]
) -> tuple[fx.Node, ...] | None:
    """The calls from ``x`` to the last one; None if they read, or are read by, anything else."""
    calls = {last}
    for node in order:
        if node not in calls:
            continue
        is_read_elsewhere = node is not last and not calls.issuperset(node.users)
        if is_read_elsewhere or node not in elementwise:
            return None
        calls.update(source for source in node.all_input_nodes if source is not x)
    return tuple(node for node in reversed(order) if node in calls)


def _is_elementwise(node: fx.Node) -> bool:
    others = [arg for arg in (*node.args, *node.kwargs.values()) if not isinstance(arg, fx.Node)]
    return _family(node) in _BENDS | _ARITHMETIC and all(
        each is None or isinstance(each, (int, float, bool, str)) for each in others
    )


def _bends(node: fx.Node) -> bool:
    return _family(node) in _BENDS


def _family(node: fx.Node) -> str | None:
    module = module_of(node)
    if module is None:
        return family_of(node)
    return None if alteration(module) else _MODULES.get(type(module))


def _activation(x: fx.Node, calls: tuple[fx.Node, ...]) -> Activation | None:
    """What these calls compute, tried on numbers from all of the range of float32."""
    try:
        with torch.no_grad():
            found = {dtype: _run(x, calls, _numbers(dtype)) for dtype in _TOLERANCES}
    except Exception as error:
        raise_lack_of_memory(error)
        return None
    fitting = (
        each for each in _ACTIVATIONS if all(_fits(found[dtype], each, dtype) for dtype in found)
    )
    return next(fitting, None)


def _run(x: fx.Node, calls: tuple[fx.Node, ...], numbers: Tensor) -> Any:
    values: dict[fx.Node, Any] = {x: numbers}
    for node in calls:
        given = {each: values[each] for each in node.all_input_nodes}
        if is_in_place(node):
            given = {each: value.clone() for each, value in given.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        called: Any = node.target
        if node.op == "call_module":
            called = module_of(node)
        elif node.op == "call_method":
            called = getattr(torch.Tensor, str(node.target))
        values[node] = called(*args, **kwargs)
    return values[calls[-1]]


def _fits(actual: Any, activation: Activation, dtype: torch.dtype) -> bool:
    x, expected = _numbers(dtype), _expected(activation.module, dtype)
    if not isinstance(actual, Tensor) or (actual.shape, actual.dtype) != (x.shape, dtype):
        return False
    scale = torch.maximum(x.abs(), expected.abs())
    return bool(((actual - expected).abs() <= _TOLERANCES[dtype] * scale).all())


@cache
def _numbers(dtype: torch.dtype) -> Tensor:
    """Numbers of both signs: densely where activations bend, and powers of ten."""
    near = torch.linspace(-12, 12, 4097, dtype=torch.float64, device="cpu")
    far = torch.logspace(-30, 30, 61, dtype=torch.float64, device="cpu")
    return torch.cat((near, far, -far)).to(dtype)


@cache
def _expected(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """An activation of `_numbers`."""
    expected: Tensor = module(_numbers(dtype))
    return expected
