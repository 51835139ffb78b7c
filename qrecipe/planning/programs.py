"""What programs with float kernels can do besides the kernels of a backend, and what they cannot.

Their integers are dequantized in the graph, so that any weight can be stored in 8 bits.
"""

from __future__ import annotations

import torch
from torch import nn

from qrecipe._torch_fx import DTypeConfig
from qrecipe.model.graph_sites import Match
from qrecipe.planning.kernels import NOT_TRAINED
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.recipe.schema import Phase

WEIGHT_ONLY = DTypeConfig(
    input_dtype=torch.float32,
    output_dtype=torch.float32,
    weight_dtype=torch.qint8,
    bias_dtype=torch.float32,
)
"""Of whatever multiplies with a weight."""

SAVES_MEMORY = "takes a quarter of the memory and is no faster: dequantized in each call"


LOOKS_UP = "takes a quarter of the memory: the rows that are looked up become float"


def no_operator(match: Match, qconfig: QConfigSpec, phase: Phase) -> str | None:
    """Why an operation cannot be quantized so in a program; None if nothing is known."""
    is_half = qconfig.weight is not None and qconfig.weight.dtype == "float16"
    if is_half and phase == "qat":
        return NOT_TRAINED
    others = "FX graph mode does" if phase == "qat" else "FX graph mode and eager mode do"
    if isinstance(match.module, (nn.RNNBase, nn.RNNCellBase)):
        return f'executor = "pt2e" has no recurrent layers: {others}'
    if isinstance(match.module, nn.EmbeddingBag):
        return f'executor = "pt2e" has no bags of integers: {others}'
    if isinstance(match.module, nn.Embedding) and qconfig.weight is not None:
        if phase == "qat":
            return f'executor = "pt2e" trains no embeddings in integers: {others}'
        if qconfig.weight.dtype == "uint4":
            return f'executor = "pt2e" has no 4-bit tables: {others}'
    if is_half:
        return f'executor = "pt2e" has no float16: {others}'
    return None
