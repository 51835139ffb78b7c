"""Trains the network of `digits.py` and writes its checkpoint: `python examples/digits/train.py`.

About a minute on two cores. The seed is fixed; the last digits of the weights still depend on the
processor.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from digits import BATCH_SIZE, CHECKPOINT, DigitNet, Digits, evaluate, training_digits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

SEED = 0
EPOCHS = 15
PEAK_LEARNING_RATE = 5e-3
MAX_TURN = 0.2  # radians
MAX_SHIFT = 0.14  # of half the image: two pixels


def main() -> None:
    """Train, print the accuracy after each epoch, and replace the checkpoint in one step."""
    torch.manual_seed(SEED)
    model = DigitNet()
    train(model, training_digits())
    save_atomically(model, CHECKPOINT)


def train(model: nn.Module, digits: Digits) -> None:
    """Train in place; the model is left in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-len(digits.labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    started = time.monotonic()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for chosen in torch.split(torch.randperm(len(digits.labels)), BATCH_SIZE):
            logits = model(jitter(digits.images[chosen]))
            loss = functional.cross_entropy(logits, digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        accuracy = evaluate(model.eval())
        print(f"epoch {epoch:2}: accuracy {accuracy:.3f}, {time.monotonic() - started:.0f} s")


def jitter(images: Tensor) -> Tensor:
    """Each image turned and shifted a little, at random."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * MAX_TURN
    shift = (torch.rand(count, 2) * 2 - 1) * MAX_SHIFT
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).reshape(count, 2, 2)
    theta = torch.cat([turn, shift.unsqueeze(2)], dim=2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def save_atomically(model: nn.Module, path: Path) -> None:
    """Write next to the target, then rename: an interrupted run keeps the old checkpoint."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(model.state_dict(), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
