"""A network that reads three handwritten digits: convolutions, and an LSTM over their columns.

As in `examples/digits/digits.py`, the command line uses `factory`, `calibration` and `evaluate`.
The images are strings of three real digits from there, placed side by side; nobody wrote them as
one string. Training strings and held-out strings consist of different digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))

from digits import (
    BATCH_SIZE,
    CALIBRATION_BATCHES,
    ConvNormReLU,
    Digits,
    held_out_digits,
    training_digits,
)

CHECKPOINT = Path(__file__).with_name("read_digits.safetensors")
LENGTH = 3
COLUMNS_OF_DIGIT = 7
HELD_OUT_STRINGS = 1000


class DigitReader(nn.Module):
    """Images [N, 1, 28, 84] to logits [N, 3, 10]: a class for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            ConvNormReLU(1, 16), ConvNormReLU(16, 32, stride=2), ConvNormReLU(32, 48, stride=2)
        )
        self.lstm = nn.LSTM(48 * 7, 64, batch_first=True)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        columns = self.convolutions(images).flatten(1, 2).transpose(1, 2)  # [N, 21, 48 * 7]
        read, _ = self.lstm(columns)
        ends = read[:, COLUMNS_OF_DIGIT - 1 :: COLUMNS_OF_DIGIT]  # each digit's last column
        logits: Tensor = self.classifier(ends)
        return logits


def factory() -> tuple[DigitReader, tuple[Tensor]]:
    """The trained network in eval mode, and an example input: a grey ramp, which needs no data."""
    model = DigitReader()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.eval(), (torch.linspace(0, 1, 28 * 84).reshape(1, 1, 28, 84),)


def calibration() -> list[Tensor]:
    """Ten batches of 64 strings of training digits, drawn with a fixed seed."""
    chosen = strings(training_digits(), CALIBRATION_BATCHES * BATCH_SIZE, seed=0)
    return list(torch.split(chosen.images, BATCH_SIZE))


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """The share of 1,000 strings of held-out digits that are read without a mistake."""
    images, labels = strings(held_out_digits(), HELD_OUT_STRINGS, seed=1)
    read = torch.cat([model(batch).argmax(2) for batch in torch.split(images, BATCH_SIZE)])
    return int((read == labels).all(1).sum()) / len(labels)


def strings(digits: Digits, count: int, seed: int) -> Digits:
    """Images [count, 1, 28, 84] of digits drawn at random, labels [count, 3]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(digits.labels), (count, LENGTH), generator=generator)
    return Digits(side_by_side(digits.images[chosen.flatten()]), digits.labels[chosen])


def side_by_side(images: Tensor) -> Tensor:
    """Every three images [3 N, 1, 28, 28] as one, [N, 1, 28, 84]."""
    return torch.cat([images[place::LENGTH] for place in range(LENGTH)], dim=3)
