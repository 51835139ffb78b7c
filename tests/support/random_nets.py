"""Random models: a few operations, each on one or two of the results before it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, SIZE = 4, 6

MODULES = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "conv_bn_relu": lambda: nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU()
    ),
    "conv_relu": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(inplace=True)),
    "depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
    "batch_norm": lambda: nn.BatchNorm2d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(SIZE),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(1),
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "linear_relu": lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU()),
    "pool": lambda: nn.MaxPool2d(3, 1, 1),
    "dropout": nn.Dropout,
}

FUNCTIONS = {
    "add": lambda a, b: a + b,
    "add_relu": lambda a, b: F.relu(a + b),
    "mul": lambda a, b: a * b,
    "gate": lambda a, b: torch.sigmoid(a) * b,
    "cat": lambda a, b: torch.cat([a, b], 1)[:, :WIDTH],
    "add_number": lambda a, b: a + 0.5,
    "mul_number": lambda a, b: a * 0.5,
    "interpolate": lambda a, b: F.interpolate(a, scale_factor=2)[:, :, :SIZE, :SIZE],
    "permute": lambda a, b: a.permute(0, 1, 3, 2),
    "shuffle": lambda a, b: torch.cat(a.chunk(2, 1)[::-1], 1),
    "reshape": lambda a, b: a.flatten(1).reshape(-1, WIDTH, SIZE, SIZE),
    "part": lambda a, b: a.chunk(2, 1)[1].repeat(1, 2, 1, 1),
    "roll": lambda a, b: torch.roll(a, 1, 2),
    "clamp": lambda a, b: a.clamp(-1, 1),
    "center": lambda a, b: a - a.mean((2, 3), keepdim=True),
}


AROUND_LINEAR = (
    *("linear",) * 5,
    *("linear_relu", "layer_norm", "relu", "dropout", "add", "cat"),
    *("permute", "shuffle", "reshape", "part", "roll"),
)
"""Operations of which most are linear layers, and what moves or drops numbers before them."""


class RandomNet(nn.Module):
    """Modules may be called again; the last two results come out."""

    def __init__(self, seed: int, operations: Sequence[str] = (*MODULES, *FUNCTIONS)) -> None:
        super().__init__()
        choose = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, int, int]] = []
        for index in range(choose.randrange(3, 12)):
            operation = choose.choice([*operations, "again"])
            if operation == "again":
                operation = choose.choice([*self.layers] or ["add"])
            elif operation in MODULES:
                name = f"{operation}{index}"
                self.layers[name] = MODULES[operation]()
                operation = name
            first = choose.randrange(max(0, index - 2), index + 1)
            self.steps.append((operation, first, choose.randrange(index + 1)))

    def forward(self, x):
        results = [x]
        for operation, first, second in self.steps:
            a, b = results[first], results[second]
            result = self.layers[operation](a) if operation in self.layers else None
            results.append(FUNCTIONS[operation](a, b) if result is None else result)
        return results[-1], results[-2]


def batches(count: int = 10) -> list[torch.Tensor]:
    """Batches that any random net takes."""
    return [torch.randn(2, WIDTH, SIZE, SIZE) for _ in range(count)]
