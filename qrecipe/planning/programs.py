"""What programs with float kernels can do besides the kernels of a backend, and what they cannot.

Their integers are dequantized in the graph, so that any weight can be stored in 8 bits.
"""

from __future__ import annotations

import torch
from torch import nn

from qrecipe._torch_fx import DTypeConfig
from qrecipe.model.graph_sites import Match
from qrecipe.recipe.recipe import QConfigSpec

WEIGHT_ONLY = DTypeConfig(
    input_dtype=torch.float32,
    output_dtype=torch.float32,
    weight_dtype=torch.qint8,
    bias_dtype=torch.float32,
)
"""Of whatever multiplies with a weight."""

SAVES_MEMORY = "takes a quarter of the memory and is no faster: dequantized in each call"


def no_operator(match: Match, qconfig: QConfigSpec) -> str | None:
    """Why an operation cannot be quantized so in a program; None if nothing is known."""
    if isinstance(match.module, (nn.RNNBase, nn.RNNCellBase)):
        return 'executor = "pt2e" has no recurrent layers: FX graph mode and eager mode do'
    if isinstance(match.module, (nn.Embedding, nn.EmbeddingBag)):
        return 'executor = "pt2e" has no embeddings in integers: FX graph mode and eager mode do'
    if qconfig.weight is not None and qconfig.weight.dtype == "float16":
        return 'executor = "pt2e" has no float16: FX graph mode and eager mode do'
    return None
