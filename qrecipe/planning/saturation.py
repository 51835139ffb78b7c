"""Where kernels for x86 can saturate: without VNNI, they add pairs of 8-bit products in 16 bits.

Two products with a weight of -128 fit into 16 bits up to an input code of 128, so seven bits are
safe and eight are not. Only engines that use ``vpmaddubsw`` are affected.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.kernels import refusal
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.recipe.schema import Backend, TensorSpec, quantized_range
from qrecipe.rules.resolution import Decision

MOST_EXACT_CODE = 128

ADDS_IN_16_BITS: frozenset[str] = frozenset({"x86", "fbgemm", "onednn"})
"""Engines whose weighted kernels saturate on a CPU without VNNI; qnnpack adds in 32 bits."""

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def exceeds_seven_bits(spec: TensorSpec) -> bool:
    """Whether a tensor of this spec has codes that can saturate."""
    limits = quantized_range(spec)
    return limits is not None and limits[1] > MOST_EXACT_CODE


def readers_of_seven_bits(
    inventory: Inventory, decisions: Mapping[str, Decision], backend: Backend
) -> dict[str, str]:
    """The operations whose result reaches a kernel limited to 7 bits, and that kernel's name.

    The result may pass through operations that copy or reshape. With a fixed range of 8 bits, it
    would make such a kernel saturate.
    """
    if backend not in ADDS_IN_16_BITS:
        return {}
    found: dict[str, str] = {}
    for name, match in reversed([*inventory.matches.items()]):
        if match.operation.kind == "passthrough":
            reader = found.get(name)
        elif _reads_seven_bits(match, decisions[name].rule.qconfig, backend):
            reader = name
        else:
            continue
        if reader is not None:
            found |= dict.fromkeys(match.operation.producers, reader)
    return found


def _reads_seven_bits(match: Match, qconfig: QConfigSpec | None, backend: Backend) -> bool:
    if qconfig is None or qconfig.weight is None or not takes_weight(match):
        return False
    activation = qconfig.activation
    if activation is None or activation.is_dynamic or quantized_range(activation) is None:
        return False
    return not exceeds_seven_bits(activation) and refusal(match, backend) is None


def takes_weight(match: Match) -> bool:
    """Whether the operation is a convolution or a linear layer."""
    return isinstance(match.module, _WEIGHTED)
