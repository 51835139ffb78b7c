"""Names of a model that clash with attributes of torch's graph modules.

A `torch.fx.GraphModule` has attributes such as ``meta``, ``graph`` and ``code``. A submodule,
parameter or buffer with such a name is renamed inside the graph, but keeps its name in sites, rules
and reports, and in the ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from qrecipe.errors.findings import Finding

_PREFIX = "_qrecipe_own_"


def _taken() -> frozenset[str]:
    graph_module = fx.GraphModule(nn.Module(), fx.Graph())
    later = {"_in_spec", "_out_spec", "preserved_attr_names"}
    return frozenset(later.union(dir(graph_module)).difference(dir(nn.Module())))


_TAKEN = _taken()
"""The attributes that torch's graph modules have in addition to those of other modules."""


def is_taken(name: str) -> bool:
    """Whether graph modules use an attribute of that name themselves."""
    return name in _TAKEN or name.startswith(_PREFIX)


def inner(target: str) -> str:
    """The name inside a graph module for the model's ``target``."""
    return f"{_PREFIX}{target}" if is_taken(target.partition(".")[0]) else target


def outer(target: str) -> str:
    """The model's own name for ``target`` of a graph module or of a model around it."""
    return ".".join(part.removeprefix(_PREFIX) for part in target.split("."))


def cannot_be_preserved(name: str) -> Finding:
    """The error (QR314) for an attribute to be preserved whose name `is_taken`."""
    key = "fx.preserved_attributes"
    message = f'{key} "{name}" has a name that torch\'s graph modules use themselves'
    return Finding("QR314", message, hint="rename the attribute", key=key)


def rename_taken(graph: fx.Graph, root: nn.Module) -> None:
    """Rename clashing names in the graph and in ``root`` to inner names."""
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr") or inner(node.target) == node.target:
            continue
        first = node.target.partition(".")[0]
        held: Any
        for held in (root._modules, root._parameters, root._buffers, vars(root)):
            if first in held:
                held[inner(first)] = held[first]
        node.target = inner(node.target)


def keep_state_names(graph_module: fx.GraphModule) -> None:
    """Make the ``state_dict`` of a graph module use the model's own names, in place."""
    members = (graph_module._modules, graph_module._parameters, graph_module._buffers)
    renamed = any(name.startswith(_PREFIX) for registry in members for name in registry)
    if renamed and _to_outer not in graph_module._state_dict_hooks.values():
        graph_module._register_state_dict_hook(_to_outer)  # type: ignore[no-untyped-call]
        graph_module._register_load_state_dict_pre_hook(_to_inner)  # type: ignore[no-untyped-call]


def _to_outer(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    for key in list(state):  # all are reinserted to keep the order
        own = key.startswith(prefix)
        state[prefix + outer(key.removeprefix(prefix)) if own else key] = state.pop(key)


def _to_inner(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in list(state):
        own = key.startswith(prefix)
        state[prefix + inner(key.removeprefix(prefix)) if own else key] = state.pop(key)
