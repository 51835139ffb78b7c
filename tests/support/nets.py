"""Toy models: each holds one thing that quantization has to get right, small and quick.

`NETS` maps a name to a `Net`: a factory for the model in eval mode and one for a batch. Weights
and batches depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """conv-bn-relu, then a block with a sum and a ReLU behind it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.head = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        return self.fc(torch.flatten(self.head(x), 1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class DepthwiseSeparable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.Hardswish()
        self.pointwise = nn.Conv2d(8, 12, 1)

    def forward(self, x):
        return self.pointwise(self.act(self.bn(self.depthwise(self.stem(x))))).mean((2, 3))


class SharedConv(nn.Module):
    """One convolution, called twice; only the first call has a ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.conv(self.relu(self.conv(x)))


class SharedConvTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x))))


class Functional(nn.Module):
    """Functions with arguments left out, as numbers, and as keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(torch.randn(6, 4, 3, 3) * 0.2)
        self.conv_bias = nn.Parameter(torch.randn(6) * 0.1)
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.3)

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.conv_weight, self.conv_bias, stride=2, padding=1))
        a, b = y.chunk(2, dim=1)
        y = torch.cat([a, b], dim=1).mean((2, 3))
        y = F.linear(y, self.weight)
        return torch.add(y, other=y, alpha=1)


class Binary(nn.Module):
    """Every spelling of a sum and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        y = a.add(b)
        y = y + torch.add(a, b, alpha=2)
        y = y.mul(b)
        y += a
        return y.matmul(b.transpose(0, 1)) @ a


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.conv(x)
        n, c, h, w = y.shape
        y = y.view(n, c, h * w).permute(0, 2, 1)
        y = self.fc(y.reshape(-1, y.size(2)))
        return y.reshape(n, h * w, c).mean(1)


class Attention(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(dim=-1)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.matmul(q, k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        y = torch.matmul(self.softmax(scores), v)
        return x + self.out(y.transpose(1, 2).reshape(n, length, width))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(8, 4, 1)
        self.up = nn.Conv2d(4, 8, 1)
        self.gate = nn.Sigmoid()
        self.act = nn.Hardswish()

    def forward(self, x):
        x = self.act(self.conv(x))
        return x * self.gate(self.up(F.relu(self.down(self.pool(x)))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.last = nn.Conv2d(9, 2, 1)

    def forward(self, x):
        y = self.up(self.down(x))
        return self.last(torch.cat([y, x], dim=1))


class Tagger(nn.Module):
    """Indices are computed with; only what follows the embedding is floating."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens):
        shifted = (tokens * 2 + 1) % 20
        mask = shifted > 3
        y = self.fc(self.dropout(self.embedding(shifted)))
        return y * mask.unsqueeze(-1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        y, (h, _) = self.lstm(x)
        return self.fc(y[:, -1]), h


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.group(self.conv(x)).mean((2, 3))
        y = self.fc(self.layer(y))
        return F.layer_norm(y, (8,))


class Keywords(nn.Module):
    """Several inputs, one optional; a tuple and a dict come out."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(5, 6)
        self.c = nn.Linear(6, 2)

    def forward(self, first, second, scale=None):
        hidden = torch.relu(self.a(first) + self.b(second))
        return self.c(hidden), {"hidden": hidden}


class Aliased(nn.Module):
    """One module under two names, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        self.unused(x)
        return torch.relu(self.second(x))


class InPlace(nn.Module):
    """In-place statements whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.fc(x)
        self.relu(y)
        y.add_(1)
        return y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
            nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1))),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def _sharpen(recurrent: nn.Module) -> None:
    """Weights of a new recurrent layer let so little through that all outputs look alike."""
    for parameter in recurrent.parameters():
        nn.init.normal_(parameter, std=0.8)


class CnnLstm(nn.Module):
    """A convolution over each step of a sequence, and an LSTM over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.fc = nn.Linear(8, 3, bias=False)
        _sharpen(self.lstm)

    def forward(self, x):
        y = self.pool(self.relu(self.bn(self.conv(x.flatten(0, 1)))))
        y, _ = self.lstm(y.reshape(x.shape[0], x.shape[1], 16))
        return self.fc(y[:, -1])


class Cells(nn.Module):
    """A GRU, and one step of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.lstm_cell = nn.LSTMCell(8, 8)
        self.gru_cell = nn.GRUCell(8, 8)
        self.rnn_cell = nn.RNNCell(8, 8)
        self.fc = nn.Linear(8, 3, bias=False)
        for module in (self.gru, self.lstm_cell, self.gru_cell, self.rnn_cell):
            _sharpen(module)

    def forward(self, x):
        y, _ = self.gru(x)
        h, _ = self.lstm_cell(y[:, -1])
        return self.fc(self.rnn_cell(self.gru_cell(h)))


class Router(nn.Module):
    """Attention blocks behind a branch that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.attention = Attention()
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        if x.sum() > 0:
            x = x * 0.5
        return self.head(self.attention(x))


@dataclass(frozen=True)
class Net:
    """``batch`` gives one batch; ``least_db`` is what static int8 reaches against float."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    least_db: float = 20.0

    def model(self) -> nn.Module:
        """The model in eval mode, with BatchNorm statistics of its own."""
        torch.default_generator.manual_seed(1)  # manual_seed: see conftest.py
        model = self.build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        return model.eval()

    def batches(self, count: int = 10) -> list[Any]:
        torch.default_generator.manual_seed(2)
        return [self.batch() for _ in range(count)]


def _image(size: int = 8) -> Callable[[], Any]:
    return lambda: torch.randn(4, 3, size, size)


def _rows(*shape: int) -> Callable[[], Any]:
    return lambda: torch.randn(*shape)


NETS: dict[str, Net] = {
    "residual": Net(Residual, _image()),
    "depthwise": Net(DepthwiseSeparable, _image()),
    "shared_conv": Net(SharedConv, _image()),
    "shared_conv_two_norms": Net(SharedConvTwoNorms, _image()),
    "functional": Net(Functional, _rows(4, 4, 8, 8)),
    "binary": Net(Binary, _rows(6, 6)),
    "shapes": Net(Shapes, _image()),
    "attention": Net(Attention, _rows(2, 5, 8)),
    "squeeze_excite": Net(SqueezeExcite, _image()),
    "decoder": Net(Decoder, _image()),
    "tagger": Net(Tagger, lambda: torch.randint(0, 20, (4, 7))),
    "recurrent": Net(Recurrent, _rows(4, 5, 6)),
    "cnn_lstm": Net(CnnLstm, _rows(2, 3, 3, 8, 8)),
    "cells": Net(Cells, _rows(4, 5, 6)),
    "norms": Net(Norms, _image()),
    "keywords": Net(Keywords, lambda: {"second": torch.randn(4, 5), "first": torch.randn(4, 4)}),
    "aliased": Net(Aliased, _rows(4, 6)),
    "in_place": Net(InPlace, _rows(4, 6)),
    "nested": Net(Nested, _rows(8, 6)),
    "mlp": Net(Mlp, _rows(8, 6)),
}

UNTRACEABLE = Net(Router, lambda: torch.randint(0, 20, (4, 7)))
