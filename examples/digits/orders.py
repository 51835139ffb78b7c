"""Eight calibration batches in every order of the first: `python examples/digits/orders.py`.

Two networks, the one of `digits.py` and a small MobileNetV2 with ReLU6 that is trained here for a
few epochs, are quantized with the same eight batches, each of them first in turn, and with three
observers of activations. A moving average stays close to the first; docs/few-batches.md shows what
that costs. About two minutes on one core.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence

import torch
from digits import evaluate, factory, held_out_digits, training_digits
from torch import Tensor, nn
from torch.nn import functional
from train import jitter

import qrecipe

BATCHES = 8
EPOCHS = 4
RECIPES = {
    "moving average": "builtin:x86-static",
    "minmax": "builtin:x86-static-minmax",
    "histogram": "builtin:x86-static-histogram",
}
HEADER = ("net", "batches", "observer", "SQNR, worst to best", "accuracy, worst to best")


class InvertedResidual(nn.Module):
    """Pointwise expansion by four, depthwise 3x3, linear projection, with a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = conv_norm(inputs, 4 * inputs, 1)
        self.depthwise = conv_norm(4 * inputs, 4 * inputs, 3, stride, groups=4 * inputs)
        self.project = conv_norm(4 * inputs, outputs, 1)[:2]
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_residual else y


class SmallMobileNet(nn.Module):
    """Images [N, 1, 28, 28] to logits [N, 10], with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(1, 16, 3, 2)
        layout = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*(InvertedResidual(*each) for each in layout))
        self.last = conv_norm(32, 96, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.last(self.blocks(self.stem(x))))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps its input's size (halves it for stride 2), BatchNorm and ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


def main() -> None:
    """Print one row for each net, kind of batches and observer."""
    torch.set_num_threads(1)
    nets = {"digits": factory()[0].eval(), "mobilenet": trained()}
    rows = [HEADER]
    for net, model in nets.items():
        for kind, batches in kinds().items():
            rows += [(net, kind, *row) for row in observed(model, batches)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        line = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(line).rstrip())


def observed(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[tuple[str, str, str]]:
    """The result of each observer, with each of the batches first in turn."""
    images, _ = held_out_digits()
    with torch.no_grad():
        reference = model(images)
    for observer, recipe in RECIPES.items():
        announce(f"observing with {observer}")
        decibels, accuracies = [], []
        for first in range(BATCHES):
            quantized = qrecipe.quantize(model, recipe, [*batches[first:], *batches[:first]])
            decibels.append(sqnr_db(reference, quantized(images)))
            accuracies.append(evaluate(quantized))
        yield observer, span(decibels, ".1f", " dB"), span(accuracies, ".3f")


def kinds() -> dict[str, list[Tensor]]:
    """Eight batches of training images: two images each, drawn at random; or eight of one class."""
    digits = training_digits()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randperm(len(digits.labels), generator=generator)[: 2 * BATCHES]
    by_class = [digits.images[digits.labels == label][:8] for label in range(BATCHES)]
    return {"2 at random": list(torch.split(digits.images[drawn], 2)), "8 of a class": by_class}


def trained() -> SmallMobileNet:
    """The small MobileNet after a few epochs, in eval mode."""
    torch.manual_seed(0)
    model, digits = SmallMobileNet(), training_digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(digits.labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for epoch in range(EPOCHS):
        announce(f"training, epoch {epoch + 1} of {EPOCHS}")
        for chosen in torch.split(torch.randperm(len(digits.labels)), 64):
            loss = functional.cross_entropy(
                model(jitter(digits.images[chosen])), digits.labels[chosen]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal-to-noise ratio of an output in dB."""
    noise = torch.linalg.vector_norm(reference - candidate)
    return float(20 * torch.log10(torch.linalg.vector_norm(reference) / noise))


def span(values: Sequence[float], form: str, unit: str = "") -> str:
    """The least and the greatest value, or one number if they look the same when printed."""
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def announce(what: str) -> None:
    """Show progress on a terminal, and nothing in a pipe."""
    if sys.stderr.isatty():
        print(what, file=sys.stderr)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=qrecipe.QRecipeWarning)
    main()
