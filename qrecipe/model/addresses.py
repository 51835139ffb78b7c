"""Addresses of operations, as rules name them and as stored on the nodes of graphs.

An address is the name in rules and reports: a module's path, or ``path:family`` for a function
called in a module's forward, with ``#k`` from the second call on.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

from qrecipe.model.altered_modules import keep_float
from qrecipe.model.class_names import class_names
from qrecipe.model.graph_names import outer
from qrecipe.model.nodes import module_of
from qrecipe.model.outputs import is_packing
from qrecipe.model.scaled_input import class_without_scale
from qrecipe.model.trace import Scopes
from qrecipe.model.trace_proof import Value
from qrecipe.registry.builtin import function_family
from qrecipe.rules.structure import Member, enclosing, joined

SITE = "site"

DROPS = "drops"
"""Marks, in a node's ``meta``, a call that returns its input in eval mode and drops in training."""

TRACE_PREFIX = "qrecipe site: "


def site_of(node: fx.Node) -> str | None:
    """The site that a node of a prepared or converted graph belongs to."""
    if SITE in node.meta:
        return str(node.meta[SITE])
    trace = node.meta.get("stack_trace") or ""
    return trace.removeprefix(TRACE_PREFIX) if trace.startswith(TRACE_PREFIX) else None


def observed_name(observer: fx.Node) -> str:
    """A description of the tensor that an observer of a prepared graph sees.

    This is a site's result, or the input of the first site that reads it if no site computes it.
    A node that reads nothing stands for itself.
    """
    source = observer.args[0] if observer.args else observer
    giver = site_of(source) if isinstance(source, fx.Node) else None
    return giver or _input_of_reader(observer) or str(source)


def _input_of_reader(node: fx.Node) -> str | None:
    waiting = [*node.users]
    for user in waiting:  # grows during iteration: the nearest reader comes first
        reader = site_of(user)
        if reader is not None:
            return f"the input of {reader}"
        waiting += (each for each in user.users if each not in waiting)
    return None


CALLS = ("call_module", "call_function", "call_method")

_QUANTIZE = (
    torch.quantize_per_tensor,
    torch.quantize_per_channel,
    torch.quantize_per_tensor_dynamic,
)


def is_conversion(node: fx.Node) -> bool:
    """Whether a node of a converted graph only goes from float to quantized or back."""
    if node.op == "call_method":
        return node.target == "dequantize"
    return node.op == "call_function" and (node.target in _QUANTIZE or _is_decomposed(node))


def quantizes_tensor(node: fx.Node) -> bool:
    """Whether a node rounds a tensor to a scale and a zero point, its second and third argument."""
    return node.target is torch.quantize_per_tensor or (
        _is_decomposed(node) and ".quantize_per_tensor" in str(node.target)
    )


def _is_decomposed(node: fx.Node) -> bool:
    """Whether a node is one of those that PT2E puts between float operators."""
    return str(node.target).startswith(
        ("quantized_decomposed.quantize_", "quantized_decomposed.dequantize_")
    )


FUNCTION_NAMES: dict[Any, str] = {
    function: f"{namespace.__name__}.{name}"
    for namespace in (torch.Tensor, operator, torch, F)
    for name, function in vars(namespace).items()
    if callable(function) and not isinstance(function, type) and not name.startswith("_")
}
"""The public dotted name of a function; of several, that of the last namespace."""


def family_of(node: fx.Node) -> str | None:
    """The family of a method or of one of torch's or Python's functions; None for all else."""
    is_method = node.op == "call_method"
    dotted = f"torch.Tensor.{node.target}" if is_method else FUNCTION_NAMES.get(node.target, "")
    return function_family(dotted)


def is_floating(node: fx.Node) -> bool:
    """Whether the node computes floating-point tensors, not sizes, masks or indices."""
    value: Value = node.meta["value"]
    return value.is_float


def carries_data(node: fx.Node) -> bool:
    """Whether the node gives floating or quantized tensors, rather than sizes or indices."""
    # nodes that conversion made carry no value and are always tensors
    return node.op in CALLS and ("value" not in node.meta or is_floating(node))


def is_plumbing(node: fx.Node) -> bool:
    """Whether the node only unpacks a container, drops, or is one of our identities."""
    unpacks = (
        node.target in (operator.getitem, getattr)
        and isinstance(node.args[0], fx.Node)
        and not node.args[0].meta["value"].is_tensor
    )
    return unpacks or node.target is keep_float or DROPS in node.meta


def unpacked(node: fx.Node) -> fx.Node:
    """The node that computes what a node returns: unpacking and identities are skipped."""
    while is_plumbing(node):
        node = node.all_input_nodes[0]
    return node


def address(graph_module: fx.GraphModule, scopes: Scopes, prefix: str) -> None:
    """Give nodes that a rule can name their ``meta["member"]``.

    ``prefix`` is the path of the graph in the whole model, from which members are named. ``scopes``
    maps a node's name to the innermost module whose forward made the call. Values must have been
    recorded by `trace_proof.record_values`.
    """
    calls: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.op not in CALLS or not is_floating(node) or is_plumbing(node) or is_packing(node):
            continue
        if "member" in node.meta:  # a transform put it there
            continue
        module = module_of(node)
        if module is not None:
            member = module_member(joined(prefix, outer(str(node.target))), module)
        else:
            member = _function_member(joined(prefix, scopes[node.name][0]), node)
        number = calls[member.name]
        calls[member.name] += 1
        if number > 0:
            member = replace(member, name=f"{member.name}#{number}")
        node.meta["member"] = member


def members_of(node: fx.Node) -> tuple[Member, ...]:
    """The operations that a node stands for, in order; none for nodes that no rule can name."""
    members: tuple[Member, ...] = node.meta.get("members", ())
    return members or ((node.meta["member"],) if "member" in node.meta else ())


def module_member(path: str, module: nn.Module) -> Member:
    """The first call of a module."""
    kind = class_without_scale(module)
    return Member(path, kind.__name__, path, class_names(kind), scopes=enclosing(path))


def _function_member(path: str, node: fx.Node) -> Member:
    if node.op == "call_method":
        dotted = f"torch.Tensor.{node.target}"
    else:
        target: Any = node.target
        own = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
        if isinstance(target, OpOverload):
            own = f"torch.{target._schema.name.partition('::')[2]}"
        dotted = FUNCTION_NAMES.get(target, own)
    family = function_family(dotted) or dotted.rpartition(".")[2].strip("_")
    names = frozenset({family, dotted})
    return Member(f"{path}:{family}", family, functions=names, scopes=enclosing(path))
