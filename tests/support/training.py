"""Recipes that train, and a few steps of training, for tests."""

from __future__ import annotations

import torch
from runs import tensors_of
from torch.ao.quantization import FakeQuantizeBase

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.model.call import Inputs

KINDS = {
    "fake_quantize": "",
    "fused_moving_average": 'observer = "moving_average_per_channel_minmax"\n',
    "learnable": "",
    "learnable_per_tensor": 'observer = "minmax"\nqscheme = "per_tensor_symmetric"\n',
}
"""What a weight needs beside the fake-quant, by the name of the case."""


def qat_recipe(kind="fake_quantize", *, base="builtin:x86-static", rules="", head=""):
    # gradients of scales are sums over whole tensors: unscaled, they overshoot at once
    learns = kind.startswith("learnable")
    name = '{ name = "learnable", use_grad_scaling = true }' if learns else f'"{kind}"'
    return qrecipe.parse_recipe(
        f'format = 1\nextends = "{base}"\nphase = "qat"\n{head}\n'
        f"[tensor.activation]\nfake_quant = {name}\n"
        f"[tensor.weight]\nfake_quant = {name}\n{KINDS[kind]}\n{rules}\n"
    )


def train(prepared, batches, *, rate=1e-5):
    """One step a batch towards an output of zero; the losses."""
    parameters = [p for p in prepared.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    losses = []
    for batch in batches:
        outputs = tensors_of(Inputs.from_batch(batch).call(prepared))
        loss = sum((t**2).mean() for t in outputs if t.is_floating_point())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model, batches, recipe):
    """Compiled, prepared and trained on the batches: ``(compiled, prepared)``."""
    compiled = qrecipe.compile(model, recipe, batches[0])
    prepared = compiled.prepare()
    train(prepared, batches)
    return compiled, prepared


def db(reference, candidate, batch):
    """The SQNR of one model's output against another's."""
    with torch.no_grad():
        call = Inputs.from_batch(batch).call
        return output_sqnr_db(call(reference), call(candidate))


def fake_quants(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizeBase)}


def qparams(model):
    """Copies of all scales and zero points, by name."""
    return {
        name: tuple(x.detach().clone() for x in module.calculate_qparams())
        for name, module in fake_quants(model).items()
    }


def same(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )
