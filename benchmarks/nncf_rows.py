"""NNCF's post-training quantization, executed by OpenVINO, for benchmarks/accuracy.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from corpus import torchvision
from torch import Tensor, nn


class Compiled:
    """A model of OpenVINO that takes and gives tensors, computing in float32 beside int8."""

    def __init__(self, model: Any) -> None:
        import openvino

        self._run = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._run(x.numpy())[0].copy())


def quantizers(
    model: nn.Module, *, is_transformer: bool
) -> dict[str, Callable[[Sequence[Tensor]], Compiled]]:
    """NNCF's ways to quantize a model, by name."""
    torchvision("models")  # NNCF would import it without care
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)

    def way(**settings: Any) -> Callable[[Sequence[Tensor]], Compiled]:
        def quantize(batches: Sequence[Tensor]) -> Compiled:
            example = batches[0][:1]
            read = openvino.convert_model(
                model, example_input=example, input=(-1, *example.shape[1:])
            )
            items = [row[None].numpy() for batch in batches for row in batch]
            data = nncf.Dataset(items)
            return Compiled(nncf.quantize(read, data, subset_size=len(items), **settings))

        return quantize

    transformer = {"NNCF: as a transformer": way(model_type=nncf.ModelType.TRANSFORMER)}
    return {
        "NNCF: as it is": way(),
        "NNCF: full bias correction": way(fast_bias_correction=False),
        **(transformer if is_transformer else {}),
    }
