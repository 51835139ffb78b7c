"""Buffers that are cut to the size of an input: positions, masks, class tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(64, 16))
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(F.relu(self.first(x + self.table[: x.size(1)])))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)))
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        count = x.size(1)
        y = self.first(x)
        scores = (y @ y.transpose(1, 2)).masked_fill(self.mask[:count, :count] == 0, -1e4)
        return self.last(scores.softmax(-1) @ y)


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("token", torch.randn(1, 1, 16))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


@pytest.mark.parametrize("kind", [Positions, Causal, ClassToken])
def test_a_buffer_that_is_cut_to_size_is_traced_and_follows_other_sizes(kind, tmp_path):
    torch.manual_seed(0)
    model, batches = kind().eval(), [torch.randn(2, 8, 16) for _ in range(12)]
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", batches, progress=silent)
    other = torch.randn(3, 5, 16)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 20
    assert sqnr_db(model(other), converted(other)) > 15
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(other), converted(other))


def test_the_first_failure_is_told_if_buffers_are_not_to_blame():
    class Branching(Positions):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(qrecipe.TraceError, match="control flow"):
        qrecipe.plan(Branching().eval(), "builtin:x86-static", torch.randn(2, 8, 16))
