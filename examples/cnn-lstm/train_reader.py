"""Trains the network of `read_digits.py`: `python examples/cnn-lstm/train_reader.py`.

Less than two minutes on one core. Every epoch combines the training digits in a new order. The
seed is fixed; the last digits of the weights still depend on the processor.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))

from digits import Digits, training_digits
from read_digits import CHECKPOINT, LENGTH, DigitReader, evaluate, side_by_side
from train import jitter, save_atomically

SEED = 0
EPOCHS = 20
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 5e-3


def main() -> None:
    """Train, print the accuracy after each epoch, and replace the checkpoint in one step."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = DigitReader()
    train(model, training_digits())
    save_atomically(model, CHECKPOINT)


def train(model: nn.Module, digits: Digits) -> None:
    """Train in place; the model is left in eval mode."""
    count = len(digits.labels) // LENGTH
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-count // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    started = time.monotonic()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        order = torch.randperm(len(digits.labels))[: count * LENGTH]
        for chosen in torch.split(order, BATCH_SIZE * LENGTH):
            logits = model(side_by_side(jitter(digits.images[chosen])))
            loss = functional.cross_entropy(logits.flatten(0, 1), digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        accuracy = evaluate(model.eval())
        print(f"epoch {epoch:2}: accuracy {accuracy:.3f}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
