"""AIMET's cross-layer equalization, for benchmarks/accuracy.py."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from corpus import torchvision
from torch import Tensor, nn

import qrecipe

Quantize = Callable[[Sequence[Tensor]], Callable[[Tensor], Tensor]]


def quantizers(model: nn.Module, base: str) -> dict[str, Quantize]:
    """The model equalized by AIMET, then quantized by a recipe or simulated by AIMET, by name."""
    torchvision("models")  # AIMET would import it without care
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    logging.disable()

    def equalized(batches: Sequence[Tensor]) -> nn.Module:
        prepared: nn.Module = prepare_model(copy.deepcopy(model))
        equalize_model(prepared, dummy_input=batches[0][:1])
        return prepared.eval()

    def by_recipe(batches: Sequence[Tensor]) -> nn.Module:
        return qrecipe.quantize(equalized(batches), base, batches, progress=False)

    def simulated(batches: Sequence[Tensor]) -> nn.Module:
        sim = QuantizationSimModel(equalized(batches), dummy_input=batches[0][:1])

        def run(quantized: nn.Module, _: Any) -> None:
            with torch.inference_mode():
                for batch in batches:
                    quantized(batch)

        sim.compute_encodings(run, None)
        simulation: nn.Module = sim.model
        return simulation

    return {f"AIMET: equalized, {base}": by_recipe, "AIMET: equalized, simulated": simulated}
