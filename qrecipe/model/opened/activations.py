"""Modules of the caller's that spell out one of torch's activations."""

from __future__ import annotations

from torch import nn

from qrecipe.errors.findings import QRecipeError
from qrecipe.model.altered_modules import alteration
from qrecipe.model.copies import structural_copy
from qrecipe.model.rewrites.activations import Activation, elementwise_calls, spelled_out
from qrecipe.model.trace import Subject, trace
from qrecipe.recipe.schema import FxTable


def is_activation(module: nn.Module) -> bool:
    """Whether all that a module computes is one of torch's activations, spelled out."""
    return _activation(module) is not None


def open_activation(module: nn.Module) -> None:
    """Turn such a module into torch's, in place."""
    found = _activation(module)
    assert found is not None, "is_activation"
    module.__class__ = type(found.module)
    settings = ("approximate", "inplace")
    vars(module).update((key, each) for key, each in vars(found.module).items() if key in settings)


def _activation(module: nn.Module) -> Activation | None:
    is_torchs = type(module).__module__.startswith("torch.")
    if is_torchs or module._modules or module._parameters or module._buffers:
        return None
    if alteration(module) is not None:
        return None
    try:
        graph = trace(Subject(structural_copy(module), "", FxTable())).graph_module.graph
    except QRecipeError:
        return None
    given, *calls, output = graph.nodes
    if not calls or output.args != (calls[-1],):
        return None
    found = spelled_out(calls[-1], elementwise_calls(graph))
    if found is None or found.x is not given or [*found.calls] != calls:
        return None
    return found.activation
