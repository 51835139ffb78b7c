"""Biases of programs for ExecuTorch."""

from __future__ import annotations

import pytest
import torch
from export_recipes import EXECUTORCH
from nets import NETS
from plans import recipe
from shares import every

import qrecipe

pytest.importorskip("torchao")

EXPORTED = qrecipe.parse_recipe(f'executor = "pt2e"\n{EXECUTORCH}')


def biases(made):
    """The bias of each layer, and the scale of what it is added to."""
    for node in made.graph.nodes:
        if str(node.target).startswith(("aten.conv", "aten.linear")) and len(node.args) > 2:
            data, weight, bias = node.args[:3]
            scales = [made.get_buffer(str(each.args[1].target)) for each in (data, weight)]
            name = str(bias.target)
            value = dict([*made.named_parameters(), *made.named_buffers()])[name]
            yield name, value.detach(), scales[0] * scales[1]


@pytest.mark.parametrize("name", every(2, ["residual", "depthwise", "mlp", "shared_conv"]))
def test_biases_are_integers_as_xnnpack_adds_them(name, tmp_path):
    net = NETS[name]
    made = qrecipe.quantize(net.model(), EXPORTED, net.batches(10))
    found = list(biases(made))
    assert len(found) == len({name for name, _, _ in found}) > 0  # each call has one
    for _, value, scale in found:
        steps = value / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3)
    qrecipe.save_quantized(made, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net.model())
    x = net.batches(1)[0]
    with torch.no_grad():
        assert torch.equal(made(x), loaded(x))


def test_biases_stay_as_they_are_where_torch_runs_them():
    net = NETS["mlp"]
    static = recipe(base="builtin:x86-static-minmax", head='executor = "pt2e"')
    made = qrecipe.quantize(net.model(), static, net.batches(10))
    stored = dict(net.model().named_parameters())
    found = [value for _, value, _ in biases(made)]
    assert len(found) == 2
    for value, name in zip(found, ("fc1.bias", "fc2.bias"), strict=True):
        assert torch.equal(value, stored[name].detach())


@pytest.mark.filterwarnings("ignore:QR203")
def test_the_reference_rounds_them_too_however_coarse_that_is():
    """The least scale of XNNPACK is coarse for small weights: that is the scheme's fault."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.002)
    batches = [torch.randn(256, 16) for _ in range(10)]
    compiled = qrecipe.compile(model, EXPORTED, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches)
    made, reference = compiled.convert(prepared), compiled._reference(prepared)
    with torch.no_grad():
        assert all(torch.equal(made(batch), reference(batch)) for batch in batches)
