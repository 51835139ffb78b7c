"""A model to quantize: how to make it, calibrate it and evaluate it.

The three functions work as they are, with a small untrained network. Put in your own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def factory() -> tuple[nn.Module, Tensor]:
    """The trained model in eval mode, and an example input.

    That is a tensor, a tuple of several, or a dict of keyword inputs: {"input_ids": ..., ...}.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    # model.load_state_dict(torch.load("weights.pt"))
    return model.eval(), _images(8)


def calibration() -> list[Tensor]:
    """About 100 batches of inputs as the model will see them, without labels, like the example."""
    # return [images for images, labels in loader]
    return [_images(8) for _ in range(100)]


def evaluate(model: nn.Module) -> float:
    """The accuracy on held-out data: a number that is higher for a better model."""
    # there are no labels here, so this is how often the model agrees with the float model
    images = _images(256)
    with torch.no_grad():
        return float((model(images).argmax(1) == factory()[0](images).argmax(1)).float().mean())


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32)
