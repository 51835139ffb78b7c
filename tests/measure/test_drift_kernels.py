"""Drift behind kernels of all engines: each is compared with its float operation."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from runs import HEAD, silent
from shares import every
from torch import fx, nn

import qrecipe
from qrecipe.audit.float_kernels import float_result, is_kernel
from qrecipe.audit.sqnr import Totals
from qrecipe.errors.findings import QRecipeWarning


@pytest.mark.parametrize("backend", every(2, ["onednn", "fbgemm", "qnnpack"]))
def test_other_engines_are_judged_alike(backend):
    if backend not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no {backend}")
    other = qrecipe.parse_recipe(
        f'{HEAD}backend = "{backend}"\n[tensor.activation]\nobserver = "minmax"\n'
    )
    for name in ("residual", "decoder"):
        net = NETS[name]
        batches = net.batches(10)
        converted = qrecipe.quantize(net.model(), other, batches, progress=silent)
        report = qrecipe.drift(converted, batches, progress=silent)
        assert max(site.moved for site in report.sites) < 0.03
        assert not any(site.is_bound for site in report.sites)


class Kernels(nn.Module):
    """Operations with int8 kernels of their own that the nets do without."""

    def __init__(self, output_padding):
        super().__init__()
        self.norm, self.also = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.instance, self.elu = nn.InstanceNorm2d(4, affine=True), nn.ELU()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=output_padding, groups=2)
        self.weight = nn.Parameter(torch.randn(4, 4, 2, 2) / 4)
        self.one, self.three = nn.Conv1d(4, 4, 3, dilation=2), nn.Conv3d(4, 4, (1, 3, 3))
        self.line = nn.Parameter(torch.randn(6, 4, 3) / 4)

    def forward(self, x):
        y = torch.relu(self.also(self.norm(x)))
        y = self.elu(self.instance(torch.relu(self.conv(y) + y)))
        y = F.hardswish(F.leaky_relu(F.elu(F.instance_norm(y)), 0.1))
        y = F.conv_transpose2d(self.up(y), self.weight, stride=(2, 1))
        z = self.three(y.unsqueeze(2)).squeeze(2)
        z = F.conv1d(self.one(z.flatten(2)), self.line, stride=2)
        return torch.mul(z, z).relu()


class Beside(fx.Interpreter):
    """Runs a converted graph and notes how near each kernel comes to its float counterpart."""

    def __init__(self, part):
        super().__init__(part)
        self.fidelity = {}

    def run_node(self, n):
        module = self.fetch_attr(n.target) if n.op == "call_module" else None
        expected = None
        if n.op in ("call_module", "call_function") and is_kernel(n, module):
            args, kwargs = fx.map_arg(
                (n.args, n.kwargs),
                lambda node: (
                    self.env[node].dequantize()
                    if isinstance(self.env[node], torch.Tensor)
                    else self.env[node]
                ),
            )
            expected = float_result(n, module, args, kwargs)
        result = super().run_node(n)
        if expected is not None:
            totals = Totals()
            totals.add(expected, result)
            self.fidelity[n.name] = totals.fidelity().sqnr_db
        return result


@pytest.mark.parametrize("backend", every(2, ["x86", "fbgemm", "qnnpack", "onednn"]))
def test_every_kernel_has_its_float_counterpart(backend):
    torch.manual_seed(0)
    batches = [torch.randn(2, 4, 8, 8) for _ in range(10)]
    recipe = qrecipe.parse_recipe(
        f'{HEAD}backend = "{backend}"\n[tensor.weight]\nobserver = "minmax"\n'
        'qscheme = "per_tensor_symmetric"\n[tensor.activation]\nobserver = "minmax"\n'
    )
    model = Kernels(0 if backend == "onednn" else 1).eval()  # which onednn has not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert len(report.sites) > 8
    for site in report.sites:
        assert not site.is_bound, site.name
        assert site.moved < 0.05, site
    # what float gives for inputs that are quantized is what the kernel rounds
    beside = Beside(converted)
    with torch.no_grad():
        beside.run(batches[0])
    assert len(beside.fidelity) > 8
    assert min(beside.fidelity.values()) > 18, beside.fidelity
