"""Quantization-aware training: what is trained is what is converted."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from plans import net_of
from shares import every
from torch import nn
from training import KINDS, db, fake_quants, qat_recipe, train, trained

import qrecipe
from qrecipe._torch_ao import _LearnableFakeQuantize
from qrecipe.errors.findings import (
    AuditError,
    CalibrationError,
    QRecipeWarning,
    UnsupportedError,
)
from qrecipe.planning.cpu import has_vnni

TRAINABLE = sorted(NETS.keys() - {"shared_conv_two_norms"})


EIGHT_BITS = {"arm-static": (), "x86-vnni-static": (pytest.mark.vnni,)}


def _runs():
    """One net with each kind, and for two of them in 8 full bits; a few others with one."""
    for (base, marks), (place, kind), (at, name) in product(
        EIGHT_BITS.items(), enumerate(KINDS), enumerate(TRAINABLE)
    ):
        is_turn = at % 16 == place and base == "arm-static"  # runs on every CPU
        is_always = is_turn or (name == "residual" and (base == "arm-static" or place < 2))
        marks = marks if is_always else (*marks, pytest.mark.slow)
        yield pytest.param(base, kind, name, marks=marks)


@pytest.mark.parametrize(("base", "kind", "name"), list(_runs()))
def test_the_converted_model_computes_what_the_trained_one_computes(name, kind, base):
    """Of 8 full bits, and once ranges are fixed: what differs are ties in rounding."""
    net = NETS[name]
    batches = net.batches(4)
    recipe = qat_recipe(kind, base=f"builtin:{base}")
    compiled, prepared = trained(net.model(), batches, recipe)
    for module in fake_quants(prepared).values():
        module.disable_observer()
    converted = compiled.convert(prepared)
    assert not fake_quants(converted)
    # the fused kernel trains symmetric scales that are 0.4 % smaller than the ones it converts
    least = 20 if kind == "fused_moving_average" else 30
    assert db(prepared.eval(), converted, batches[1]) > least


def test_weights_that_moved_since_they_were_observed_are_observed_once_more():
    net = NETS["mlp"]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, qat_recipe(base="builtin:arm-static"))
    with torch.no_grad():
        prepared.fc1.weight.mul_(4)
    scales = compiled.convert(prepared).fc1.weight().q_per_channel_scales()
    rows = prepared.fc1.weight.detach().abs().amax(1)
    torch.testing.assert_close(scales.float(), rows / 127.5, rtol=0.02, atol=0)


def test_seven_bits_are_clipped_in_training_and_not_by_the_kernels():
    """Why a recipe for CPUs with VNNI is the better one to train: docs/training.md."""
    net = NETS["mlp"]
    batches = net.batches(4)
    wide = [3 * batches[1]]
    _, full = trained(net.model(), batches, qat_recipe(base="builtin:arm-static"))
    compiled, seven = trained(net.model(), batches, qat_recipe(base="builtin:x86-static"))
    converted = compiled.convert(seven)
    assert db(seven.eval(), converted, wide[0]) < 15
    assert full(wide[0]).abs().max() > 0


# --- learnable scales


@pytest.mark.parametrize("kind", every(2, ["learnable", "learnable_per_tensor"]))
def test_scales_and_zero_points_are_learnt_by_their_gradients(kind):
    torch.manual_seed(0)
    net = NETS["mlp"]
    batches = net.batches(8)
    recipe = qat_recipe(kind)
    compiled = qrecipe.compile(net.model(), recipe, batches[0])
    prepared = compiled.prepare()
    with torch.no_grad():
        prepared(batches[0])  # the first batch gives the estimate to start from
    learnt = {
        n: m for n, m in fake_quants(prepared).items() if isinstance(m, _LearnableFakeQuantize)
    }
    weight = prepared.fc1.weight_fake_quant
    assert weight.scale.shape == ((16,) if kind == "learnable" else (1,))
    assert all(m.static_enabled[0] == 0 and m.learning_enabled[0] == 1 for m in learnt.values())
    with torch.no_grad():
        for module in learnt.values():
            module.scale.mul_(20)  # far too coarse
            module.zero_point.add_(9)
    before = {
        n: (m.scale.detach().clone(), m.zero_point.detach().clone()) for n, m in learnt.items()
    }
    target = net.model()(batches[0]).detach()
    # only the scales and zero points may learn
    only = [p for m in learnt.values() for p in (m.scale, m.zero_point)]
    optimizer = torch.optim.Adam(only, lr=1e-3)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(prepared(batches[0]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    moved = {n for n, m in learnt.items() if not torch.equal(m.scale, before[n][0])}
    assert moved == learnt.keys()
    assert any(not torch.equal(m.zero_point, before[n][1]) for n, m in learnt.items())
    converted = compiled.convert(prepared)
    scale, _ = weight.calculate_qparams()
    packed = converted.fc1.weight()
    found = packed.q_per_channel_scales() if kind == "learnable" else packed.q_scale()
    torch.testing.assert_close(torch.as_tensor(found).float().reshape(-1), scale.reshape(-1))
    assert db(prepared.eval(), converted, batches[0]) > 25


def test_each_layer_learns_as_many_scales_as_it_has_channels():
    net = NETS["residual"]
    prepared = qrecipe.compile(net.model(), qat_recipe("learnable"), net.batches(1)[0]).prepare()
    assert prepared.conv1.weight_fake_quant.scale.shape == (8,)
    assert prepared.fc.weight_fake_quant.scale.shape == (5,)


def test_a_learnable_scale_that_collapsed_is_named():
    net = NETS["mlp"]
    compiled, prepared = trained(net.model(), net.batches(3), qat_recipe("learnable"))
    with torch.no_grad():
        prepared.fc1.weight_fake_quant.scale.fill_(-1.0)
    with pytest.raises(CalibrationError, match="collapsed"):
        compiled.convert(prepared)


# --- shared modules


def test_a_module_that_is_called_twice_keeps_one_weight():
    net = NETS["shared_conv"]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, qat_recipe())
    convs = [m for m in prepared.modules() if hasattr(m, "weight_fake_quant")]
    shared = {id(conv.weight) for conv in convs}
    assert len(convs) == 2
    assert len(shared) == 1
    ranges = [s for s in compiled.plan.sites if s.op.startswith("Conv2d")]
    assert len(ranges) == 2
    assert compiled.convert(prepared)(batches[0]).isfinite().all()


def test_a_module_that_is_called_twice_and_fused_with_batch_norm_is_refused():
    net = NETS["shared_conv_two_norms"]
    model, batch = net.model(), net.batches(1)[0]
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(model, qat_recipe(), batch)
    (finding,) = caught.value.findings
    assert finding.code == "QR312"
    assert '"conv" = "float"' in finding.hint
    calls = '"conv" = "float"\n'
    compiled = qrecipe.compile(model, qat_recipe(rules=f"[rules.module_name]\n{calls}"), batch)
    assert {s.verdict for s in compiled.plan.sites if s.op.startswith("Conv2d")} == {"float"}
    prepared = compiled.prepare()
    train(prepared, net.batches(2))
    assert compiled.convert(prepared)(batch).isfinite().all()


# --- dynamic and weight-only sites, and ties


EMBEDDING = qrecipe.parse_recipe(
    'format = 1\nextends = "builtin:embedding-weight-only"\nphase = "qat"\n'
)
TOKENS = torch.arange(20).reshape(4, 5)


def test_an_embedding_keeps_its_tie_and_one_table_for_two_calls():
    tied = net_of(
        lambda self, i: self.head(self.embed(i)),
        embed=nn.Embedding(20, 8),
        head=nn.Linear(8, 20, bias=False),
    )
    tied.head.weight = tied.embed.weight
    twice = net_of(lambda self, i: self.e(i) * self.e(i.flip(1)), e=nn.Embedding(20, 8))
    for model in (tied, twice):
        compiled, prepared = trained(model, [TOKENS] * 3, EMBEDDING)
        assert len(list(prepared.parameters())) == 1
        assert not torch.equal(next(prepared.parameters()), next(model.parameters()))
        assert compiled.convert(prepared)(TOKENS).isfinite().all()


def test_a_table_whose_rows_have_one_sign_is_trained_and_converted():
    model = net_of(lambda self, i: self.e(i), e=nn.Embedding(20, 8))
    nn.init.uniform_(model.e.weight, 0.5, 1.0)
    compiled, prepared = trained(model, [TOKENS] * 2, EMBEDDING)
    assert db(prepared.eval(), compiled.convert(prepared), TOKENS) > 30


def seven_bits(kind):
    """What is clipped in training and not by the kernels makes these nets look coarse."""
    return qat_recipe(kind, base="builtin:cnn-lstm", head='[lint]\nignore = ["QR203"]')


@pytest.mark.parametrize("kind", ["fake_quantize", "learnable"])
@pytest.mark.parametrize("name", ["cells", "cnn_lstm"])
def test_dynamic_recurrent_layers_are_trained_and_converted(name, kind):
    net = NETS[name]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, seven_bits(kind))
    assert "dynamic" in {site.mode for site in compiled.plan.sites}
    assert db(prepared.eval(), compiled.convert(prepared), batches[0]) > 10


def test_float16_says_that_it_cannot_be_trained():
    recipe = qrecipe.parse_recipe('format = 1\nextends = "builtin:float16-dynamic"\nphase = "qat"')
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(NETS["mlp"].model(), recipe, NETS["mlp"].batches(1)[0])
    assert "training does not simulate float16" in caught.value.findings[0].hint


def test_calls_by_keyword_are_trained_and_converted():
    model = net_of(
        lambda self, x: self.fc(input=self.lstm(input=x, hx=None)[0]),
        lstm=nn.LSTM(6, 6),
        fc=nn.Linear(6, 3),
    )
    batches = [torch.randn(4, 2, 6) for _ in range(3)]
    compiled, prepared = trained(model, batches, qat_recipe(base="builtin:cnn-lstm"))
    assert db(prepared.eval(), compiled.convert(prepared), batches[0]) > 10


def test_a_conversion_that_differs_from_what_was_trained_says_so_in_its_own_words():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    small = torch.rand(16, 4)
    recipe = qrecipe.parse_recipe('format = 1\nextends = "builtin:x86-static"\nphase = "qat"')
    compiled = qrecipe.compile(model, recipe, 10 * small)
    prepared = compiled.prepare()
    prepared(small)  # training clips at 7 bits of this range, the kernel at 8
    if has_vnni():
        with pytest.warns(QRecipeWarning, match="QR203 .* between the trained model and the"):
            compiled.convert(prepared)
    else:
        with pytest.raises(AuditError, match=r"QR416 .* example inputs .* calibrated range"):
            compiled.convert(prepared)


class ScaledMean(nn.Module):
    """The mean works on the grid of the product, which training does not simulate."""

    def __init__(self, by):
        super().__init__()
        self.conv, self.linear, self.by = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), by

    def forward(self, x):
        return self.linear((torch.relu(self.conv(x)) * self.by).mean((2, 3)))


@pytest.mark.parametrize("by", [0.01, 0.5])
def test_what_follows_a_product_with_a_number_is_judged_on_the_grid_of_its_input(by):
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(10)]
    compiled, prepared = trained(ScaledMean(by), batches, qat_recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)  # the training was coarser (QR203)
        converted = compiled.convert(prepared)
    assert {site.name: site.verdict for site in compiled.plan.sites}[":mean"] == "passthrough"
    assert torch.isfinite(converted(batches[0])).all()
