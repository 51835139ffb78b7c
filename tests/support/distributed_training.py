"""Training under DistributedDataParallel by each rank of a group, with its share of the data."""

from __future__ import annotations

import torch
from nets import NETS
from torch.nn.parallel import DistributedDataParallel
from training import qat_recipe

import qrecipe

KINDS = ("fake_quantize", "learnable")
STEPS = 6


def trained_by(kind, rank):
    """What the trained and the converted model give, and the trained parameters."""
    torch.manual_seed(0)
    net = NETS["residual"]
    batches = net.batches(2 * STEPS)
    compiled = qrecipe.compile(net.model(), qat_recipe(kind), batches[0])
    prepared = compiled.prepare()
    wrapped = DistributedDataParallel(prepared)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    schedule = qrecipe.qat_schedule(wrapped, optimizer, original_steps=10 * STEPS)
    for step in range(schedule.total_steps):
        loss = wrapped(batches[2 * step + rank]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    converted = compiled.convert(prepared)
    wrapped.eval()
    with torch.no_grad():
        outputs = [model(batches[0]) for model in (wrapped, converted)]
    parameters = {name: p.detach() for name, p in prepared.named_parameters()}
    return outputs, parameters
