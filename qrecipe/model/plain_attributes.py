"""Plain attributes of a module, which the code around it may read once it is quantized."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import chain
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_fx import attach_preserved_attrs_to_model
from qrecipe.errors.findings import PlanError
from qrecipe.model.graph_names import is_taken
from qrecipe.model.kept import PRIVATE
from qrecipe.model.unfit import unfit

_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    PurePath,
)
_SEQUENCES = (tuple, list, set, frozenset, deque)
_OF_EVERY_MODULE = frozenset(dir(nn.Module())) | {PRIVATE, "qconfig"}


def keep_plain_attributes(former: nn.Module, successor: nn.Module) -> None:
    """Give ``successor`` copies of the plain attributes of the module whose place it takes.

    Those are numbers, texts, containers and objects of them, of the module or its class: nothing
    that computes, and nothing with a tensor or a module in it.
    """
    registered = (*successor._modules, *successor._parameters, *successor._buffers)
    kept = {
        name: copy.deepcopy(value)
        for name, value in _attributes(former)
        if name not in registered and not hasattr(type(successor), name) and _is_plain(value)
    }
    if isinstance(successor, fx.GraphModule):  # its copies only have what torch is told to preserve
        attach_preserved_attrs_to_model(successor, kept)
    else:
        vars(successor).update(kept)


def preserve_attributes(model: nn.Module, graph: nn.Module, names: Sequence[str]) -> None:
    """Give a graph that takes the place of a model these attributes of it, in place.

    Those of the model's class are copied, as copies of models share the class. Other modules than
    graphs are copies of the model, and have them.

    Raises ``PlanError`` if one cannot be copied (QR306), or is a module that the graph calls
    (QR314).
    """
    if not isinstance(graph, fx.GraphModule):
        return
    called = {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    for name in filter(called.__contains__, names):
        message = f'fx.preserved_attributes "{name}" is a module that the model calls'
        hint = "leave it out: the graph has its own"
        raise PlanError.of("QR314", message, hint=hint, key="fx.preserved_attributes")
    attach_preserved_attrs_to_model(graph, {name: _own_value(model, name) for name in names})


def _own_value(model: nn.Module, name: str) -> Any:
    value = getattr(model, name)
    if value is not getattr(type(model), name, None):
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:
        hint = "set it in the model's __init__, or make copy.deepcopy work"
        raise unfit(f"its class attribute {name} cannot be copied: {error}", hint) from error


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that are its author's, those of its classes first."""
    kinds = [kind for kind in reversed(type(module).__mro__) if not _is_torchs(kind)]
    is_layer = _is_torchs(type(module)) and not isinstance(module, fx.GraphModule)
    internal = "_" if is_layer else "__"
    for name, value in chain.from_iterable(vars(owner).items() for owner in (*kinds, module)):
        if not (name in _OF_EVERY_MODULE or is_taken(name) or name.startswith(internal)):
            yield name, value


def _is_torchs(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] == "torch"


def _is_plain(value: Any, around: frozenset[int] = frozenset()) -> bool:
    if isinstance(value, _LEAVES) or id(value) in around:
        return True
    if type(value).__module__ == "numpy":
        return True
    inner = around | {id(value)}
    if isinstance(value, Mapping):
        return all(_is_plain(part, inner) for pair in value.items() for part in pair)
    if isinstance(value, _SEQUENCES):
        return all(_is_plain(part, inner) for part in value)
    if isinstance(value, (Tensor, nn.Module)) or callable(value) or hasattr(value, "__get__"):
        return False
    return hasattr(value, "__dict__") and _is_plain(vars(value), inner)
