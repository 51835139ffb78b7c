"""What a model spends its multiplications on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qrecipe.copying import runnable_copy
from qrecipe.inputs import Inputs
from qrecipe.trials import try_out

_CONVOLUTIONS = ("aten.convolution", "aten._convolution")
_PRODUCTS = ("aten.mm", "aten.addmm")
_LSTM = "aten.mkldnn_rnn_layer"


@dataclass(frozen=True, slots=True)
class Work:
    """Multiplications with weights in one run, and the number of parameters.

    ``convolutions`` and ``products`` (linear and recurrent layers) count operations of torch, of
    functions as well as modules; products of two activations, as in attention, are not among them.
    """

    convolutions: int
    products: int
    parameters: int

    @property
    def convolution_share(self) -> float:
        """The share of convolutions, 0 to 1; 0 where nothing is multiplied."""
        return self.convolutions / max(1, self.convolutions + self.products)


def work_of(model: nn.Module, inputs: Inputs) -> Work:
    """Count the multiplications of one run of a copy of the model."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _lstm_flops}
    )
    with torch.random.fork_rng(devices=[]), counter:
        try_out(runnable_copy(model), inputs.cloned(), model)
    counts = {
        str(operation): n // 2
        for operation, n in counter.get_flop_counts().get("Global", {}).items()
    }
    return Work(
        sum(counts.get(name, 0) for name in _CONVOLUTIONS),
        sum(counts.get(name, 0) for name in (*_PRODUCTS, _LSTM)),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _lstm_flops(
    x: Sequence[int], input_weight: Sequence[int], hidden_weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """A step multiplies every weight once for each sample; x is (steps, samples, features)."""
    weights = input_weight[0] * input_weight[1] + hidden_weight[0] * hidden_weight[1]
    return 2 * x[0] * x[1] * weights
