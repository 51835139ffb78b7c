"""Two small nets with the typical parts of their kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 8000


class LanguageModel(nn.Module):
    """Tokens [N, T] to logits of the next token [N, T, VOCABULARY]."""

    def __init__(self, width: int = 384, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.decoder = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.decoder(hidden)
        return logits


class TransformerEncoder(nn.Module):
    """Tokens [N, T] to logits of a class [N, classes]."""

    def __init__(self, width: int = 256, layers: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.Sequential(*(EncoderLayer(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        encoded = self.norm(self.layers(self.embedding(tokens)))
        logits: Tensor = self.classifier(encoded.mean(1))
        return logits


class EncoderLayer(nn.Module):
    """Attention and two linear layers, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.activation = nn.ReLU()
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.contract(self.activation(self.expand(self.norm(x))))
        return out


class Attention(nn.Module):
    """Self-attention whose projections are separate linear layers that rules can name.

    torch's `MultiheadAttention` is one operation, which has no quantized kernel on x86.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            self._heads(projection(x)) for projection in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """[N, T, width] to [N, heads, T, width / heads]."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)
