"""Modules of the caller's that only multiply with a matrix."""

from __future__ import annotations

import operator

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qrecipe.errors.findings import QRecipeError
from qrecipe.model.copies import structural_copy
from qrecipe.model.nodes import called_modules
from qrecipe.model.rewrites.weighted_layers import (
    products_as_linear,
    weighted_layers_as_modules,
)
from qrecipe.model.trace import Subject, trace
from qrecipe.recipe.schema import FxTable

_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "size", getattr, operator.getitem, operator.add}
)

_UNDER_OTHERS = frozenset({NonDynamicallyQuantizableLinear})
"""A class of torch's own for linear layers whose weights others read; called, it is a plain one."""


def is_product(module: nn.Module) -> bool:
    """Whether a module of the caller's only multiplies with its one matrix, and may add a vector.

    It may reshape before and after.
    """
    return _as_linear(module, calls_function=type(module) in _UNDER_OTHERS) is not None


def is_linear(module: nn.Module) -> bool:
    """The same, also by ``F.linear``, as in a subclass of ``nn.Linear``."""
    return type(module) is not nn.Linear and _as_linear(module, calls_function=True) is not None


def open_product(module: nn.Module) -> None:
    """Turn such a module into a linear layer, in place; the tensors stay shared."""
    made = _as_linear(module, calls_function=True)
    assert made is not None, "is_linear"
    module.__class__ = nn.Linear
    vars(module).update(
        _parameters=made._parameters, in_features=made.in_features, out_features=made.out_features
    )


def _as_linear(module: nn.Module, calls_function: bool) -> nn.Linear | None:
    """The layer that computes the same, if a module is one; it may call ``F.linear`` for that."""
    ranks = sorted(parameter.dim() for parameter in module.parameters())
    is_torchs = type(module).__module__.startswith("torch.") and type(module) not in _UNDER_OTHERS
    if is_torchs or ranks not in ([2], [1, 2]) or module._modules or module._buffers:
        return None
    try:
        graph_module = trace(Subject(structural_copy(module), "", FxTable())).graph_module
    except QRecipeError:
        return None
    products_as_linear(graph_module)
    if calls_function:
        weighted_layers_as_modules(graph_module)
    graph = graph_module.graph
    made = [module for _, module in called_modules(graph)]
    others = [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]
    return made[0] if len(made) == 1 and _RESHAPES.issuperset(others) else None
