"""Functions with a flag for training mode: dropouts and BatchNorm."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qrecipe.model.nested import Packing

BATCH_NORMS = (F.batch_norm, torch.batch_norm)

_DROPOUT = ("input", "p", "train")
_BUILTINS: Mapping[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.dropout, torch.dropout_), _DROPOUT),
    **dict.fromkeys((torch.alpha_dropout, torch.alpha_dropout_), _DROPOUT),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_), _DROPOUT),
    **dict.fromkeys((torch.feature_alpha_dropout, torch.feature_alpha_dropout_), _DROPOUT),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}
"""The parameters of functions that Python cannot inspect."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function by name, with the defaults of those not given.

    Empty for other calls, and for functions that cannot be inspected.
    """
    function: Any = node.target
    if node.op != "call_function":
        return {}
    if function in _BUILTINS:
        return {**dict(zip(_BUILTINS[function], node.args, strict=False)), **node.kwargs}
    if not inspect.isfunction(function):
        return {}
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except TypeError:  # a wrapper that changes the parameters
        return {}
    bound.apply_defaults()
    return bound.arguments


def flag(node: fx.Node) -> Any:
    """The argument that tells a function whether it is in training mode, or None."""
    given = arguments(node)
    return given.get("training", given.get("train"))


def told(node: fx.Node, idle: Collection[str]) -> tuple[Any, ...]:
    """The target and arguments of a node, without those that training mode may change.

    ``idle`` are the names of calls that return their input in eval mode.
    """
    if node.name in idle:
        return (node.target, str(node.all_input_nodes))
    if node.target in BATCH_NORMS:
        given = arguments(node)
        return (node.target, *(str(given.get(name)) for name in _SAME))
    # each trace builds containers by an object of its own
    target = node.target.__qualname__ if isinstance(node.target, Packing) else node.target
    return (target, str(node.args), str(node.kwargs))


_SAME = ("input", "running_mean", "running_var", "weight", "bias", "eps")
