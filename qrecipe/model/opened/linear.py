"""Linear layers made of the parameters that other layers hold."""

from __future__ import annotations

import operator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qrecipe.errors.findings import QRecipeError
from qrecipe.model.copies import structural_copy
from qrecipe.model.nodes import stored
from qrecipe.model.rewrites.products import products_as_linear
from qrecipe.model.trace import trace
from qrecipe.recipe.schema import FxTable

_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "size", getattr, operator.getitem, operator.add}
)

_ARGUMENTS = ("input", "weight", "bias")
_UNDER_OTHERS = frozenset({NonDynamicallyQuantizableLinear})
"""A class of torch's own for linear layers whose weights others read; called, it is a plain one."""


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer on the memory of a weight (outputs, inputs) and a bias (outputs)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta").eval()
    made.weight = _parameter(weight)
    if bias is not None:
        made.bias = _parameter(bias)
    return made


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), tensor.requires_grad)


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
        graph_module, _ = trace(structural_copy(module), "", {}, FxTable(), {})
    except QRecipeError:
        return None
    made = products_as_linear(graph_module)
    if calls_function:
        made = [node for node in graph_module.graph.nodes if node.target is F.linear]
    calls = [node for node in graph_module.graph.nodes if node.op.startswith("call_")]
    if len(made) != 1 or any(node.target not in _RESHAPES for node in calls if node not in made):
        return None
    given = {**dict(zip(_ARGUMENTS, made[0].args, strict=False)), **made[0].kwargs}
    weight, bias = (stored(given.get(name), graph_module) for name in ("weight", "bias"))
    return None if weight is None else linear(weight, bias)
