"""A small transformer encoder for the same digits, with channels as large language models have.

It reads the 28 rows of an image as tokens. ``python encoder.py`` trains it (under a minute).

In large models, a few channels of what a LayerNorm gives are tens of times as large as the others.
A model of this size does not grow such channels, so `outlying` makes them: it multiplies a few
channels of each LayerNorm by 32, and divides the weights that read them by 32. The function stays
the same, but one scale for a whole tensor no longer fits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from digits import BATCH_SIZE, evaluate, training_digits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

CHECKPOINT = Path(__file__).with_name("encoder.safetensors")
WIDTH, HEADS, BLOCKS = 32, 4, 2
EPOCHS = 15


class Attention(nn.Module):
    """Self-attention with its four linear layers. [N, tokens, WIDTH]"""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and two linear layers, each after a LayerNorm and around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.narrow(functional.gelu(self.wide(self.norm2(x))))
        return out


class Encoder(nn.Module):
    """Images [N, 1, 28, 28] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(28, WIDTH)
        self.position = nn.Parameter(torch.zeros(28, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.rows(x.squeeze(1)) + self.position)
        logits: Tensor = self.classifier(self.norm(x).mean(1))
        return logits


def factory() -> tuple[Encoder, tuple[Tensor]]:
    """The trained encoder in eval mode, and an example input."""
    model = Encoder()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.eval(), (torch.linspace(0, 1, 28 * 28).reshape(1, 1, 28, 28),)


@torch.no_grad()
def outlying(model: Encoder, seed: int = 0, channels: int = 3, factor: float = 32.0) -> Encoder:
    """A copy of the encoder that computes the same, with a few large channels after each norm."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    blocks: Any = changed.blocks
    for block in blocks:
        attention = block.attention
        for norm, readers in (
            (block.norm1, (attention.query, attention.key, attention.value)),
            (block.norm2, (block.wide,)),
        ):
            large = torch.randperm(WIDTH, generator=generator)[:channels]
            norm.weight[large] *= factor
            norm.bias[large] *= factor
            for reader in readers:
                reader.weight[:, large] /= factor
    return changed


def train() -> Encoder:
    """The encoder trained on 4,000 digits, each shifted by up to two pixels in every epoch."""
    torch.manual_seed(0)
    model, data = Encoder(), training_digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = EPOCHS * (len(data.labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(data.labels))
        for chosen in torch.split(order, BATCH_SIZE)[: steps // EPOCHS]:
            shift = tuple(torch.randint(-2, 3, (2,)).tolist())
            images = data.images[chosen].roll(shift, (2, 3))
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), data.labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    trained = train()
    print(f"{evaluate(trained):.1%} of the held-out digits are right")
    save_file(trained.state_dict(), CHECKPOINT)
