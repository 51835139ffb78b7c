"""Linear layers made of the parameters that other layers hold."""

from __future__ import annotations

import operator

from torch import Tensor, nn

from qrecipe.errors.findings import QRecipeError
from qrecipe.model.copies import structural_copy
from qrecipe.model.normalize import stored
from qrecipe.model.rewrites.products import products_as_linear
from qrecipe.model.trace import trace
from qrecipe.recipe.schema import FxTable

_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "size", getattr, operator.getitem, operator.add}
)


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
    return _as_linear(module) is not None


def open_product(module: nn.Module) -> None:
    """Turn such a module into a linear layer, in place; the tensors stay shared."""
    made = _as_linear(module)
    assert made is not None, "is_product"
    module.__class__ = nn.Linear
    vars(module).update(
        _parameters=made._parameters, in_features=made.in_features, out_features=made.out_features
    )


def _as_linear(module: nn.Module) -> nn.Linear | None:
    ranks = sorted(parameter.dim() for parameter in module.parameters())
    is_torchs = type(module).__module__.startswith("torch.")
    if is_torchs or ranks not in ([2], [1, 2]) or module._modules or module._buffers:
        return None
    try:
        graph_module, _ = trace(structural_copy(module), "", {}, FxTable(), {})
    except QRecipeError:
        return None
    made = products_as_linear(graph_module)
    calls = [node for node in graph_module.graph.nodes if node.op.startswith("call_")]
    if len(made) != 1 or any(node.target not in _RESHAPES for node in calls if node not in made):
        return None
    _, weight, bias = made[0].args
    return linear(stored(weight, graph_module), stored(bias, graph_module))
