"""Functions with a flag for training mode: dropouts and BatchNorm."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.nested import Packing

BATCH_NORMS = (F.batch_norm, torch.batch_norm)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function by name, with the defaults of those not given.

    Empty for other calls, and for functions whose parameters cannot be told.
    """
    if node.op != "call_function":
        return {}
    try:
        found = node.normalized_arguments(nn.Module(), normalize_to_only_use_kwargs=True)
    except (RuntimeError, TypeError):  # several overloads, or a wrapper of other parameters
        return {}
    return {} if found is None else dict(found.kwargs)


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
