"""Models that convert tensors so often that there is little to multiply in between."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from qrecipe.model.call import batch_size
from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.plan import Site

_LEAST = 1 << 20
"""The multiplications of a sample that pay for one conversion: decisions/0046-small-layers.md."""


_FEW = 4
"""With no more conversions, a model is int8 throughout, from its inputs to its outputs."""


def hardly_multiplies(sites: Sequence[Site], inventory: Inventory, boundaries: int) -> bool:
    """Whether a static model has too little work for each of its conversions."""
    layers = [
        inventory.matches[site.name]
        for site in sites
        if site.mode == "static" and inventory.matches[site.name].has_weights
    ]
    if not inventory.parts or boundaries <= _FEW:
        return False
    few = inventory.parts[0].example.inputs
    samples = batch_size((few.args, dict(few.kwargs))) or 1
    return 0 < sum(map(_multiplications, layers)) < boundaries * samples * _LEAST


def _multiplications(layer: Match) -> int:
    """What a convolution or linear layer does on the example's few samples, 0 if unknown."""
    value = layer.nodes[-1].meta.get("value")
    if layer.module is None or value is None or value.shape is None:
        return 0
    weight = next(each for each in layer.module.parameters() if each.dim() > 1)
    count: int = prod(value.shape) * prod(weight.shape[1:])
    return count
