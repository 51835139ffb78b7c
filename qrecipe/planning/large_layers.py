"""Linear layers with so much to multiply that onednn is faster than fbgemm, which x86 uses."""

from __future__ import annotations

from math import prod

from torch import nn

from qrecipe.model.graph_sites import Match
from qrecipe.planning.engines import Detour
from qrecipe.recipe.schema import Backend, TensorSpec

_ROWS = 128
"""The fewest rows of a single item of a batch: with 64, onednn is slower than fbgemm."""

_WEIGHTS = 1 << 17
"""The fewest weights: onednn takes longer to quantize the input of a dynamic layer."""

_PRODUCTS = 1 << 29
"""The fewest multiplications in a call, next to which preparing a kernel is nothing."""


def faster_linear(match: Match, backend: Backend, weight: TensorSpec | None) -> Detour | None:
    """The detour of a layer that is large for the example: docs/decisions/0013-engines.md."""
    if backend != "x86" or not has_choice(match) or not match.shape:
        return None
    if weight is None or weight.dtype != "int8" or not weight.is_symmetric:
        return None
    assert isinstance(match.module, nn.Linear)
    weights = match.module.weight.numel()
    is_large = weights >= _WEIGHTS and prod(match.shape[:-1]) * weights >= _PRODUCTS
    if is_large and prod(match.shape[1:-1]) >= _ROWS:
        return Detour("onednn", "it is faster where there is this much to multiply")
    return None


def has_choice(match: Match) -> bool:
    """Whether the size of the example may decide the engine of a site."""
    return isinstance(match.module, nn.Linear)


def reads_tokens(model: nn.Module) -> bool:
    """Whether a model looks tokens up: its inputs may be far shorter than the example."""
    return any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules())
