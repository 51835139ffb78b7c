"""Quantization-aware training: prepared in training mode, trained by the caller, converted."""

from __future__ import annotations

import copy
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from differential import snapshot
from nets import NETS
from plans import net_of, sites
from runs import silent
from torch import nn
from torch.ao.quantization import FakeQuantizeBase
from training import KINDS, qat_recipe, train, trained

import qrecipe
from qrecipe._torch_ao import _LearnableFakeQuantize
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import (
    AuditError,
    CalibrationError,
    PlanError,
    QRecipeWarning,
    UnsupportedError,
)
from qrecipe.model.call import Inputs
from qrecipe.planning.cpu import has_vnni

TRAINABLE = sorted(NETS.keys() - {"shared_conv_two_norms"})


def db(reference, candidate, batch):
    with torch.no_grad():
        call = Inputs.from_batch(batch).call
        return output_sqnr_db(call(reference), call(candidate))


def fake_quants(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizeBase)}


def qparams(model):
    return {
        name: tuple(x.detach().clone() for x in module.calculate_qparams())
        for name, module in fake_quants(model).items()
    }


def same(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


# --- what is trained is what is converted


EIGHT_BITS = {"arm-static": (), "x86-vnni-static": (pytest.mark.vnni,)}


def _runs():
    """A net with each kind for each base always, the others with one kind, and the rest as slow."""
    for (base, marks), (place, kind), (at, name) in product(
        EIGHT_BITS.items(), enumerate(KINDS), enumerate(TRAINABLE)
    ):
        is_turn = at % len(KINDS) == place and base == "arm-static"  # runs on every CPU
        is_always = name == "residual" or is_turn or (name, base) == ("attention", "arm-static")
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


@pytest.mark.parametrize("kind", ["learnable", "learnable_per_tensor"])
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


# --- the caller's model, and the prepared one


@pytest.mark.parametrize("name", ["residual", "shared_conv", "functional", "recurrent"])
def test_training_leaves_the_callers_model_bit_identical(name):
    net = NETS[name]
    model = net.model()
    before = snapshot(model)
    compiled, prepared = trained(model, net.batches(3), qat_recipe())
    compiled.convert(prepared)
    assert snapshot(model) == before
    assert not any(hasattr(module, "qconfig") for module in model.modules())


def test_prepare_gives_a_model_in_training_mode_and_each_call_a_new_one():
    net = NETS["residual"]
    compiled = qrecipe.compile(net.model(), qat_recipe(), net.batches(1)[0])
    one, two = compiled.prepare(), compiled.prepare()
    assert one.training
    assert one.conv1.training
    train(one, net.batches(2))
    assert torch.equal(two.conv1.weight, net.model().conv1.weight)
    assert not torch.equal(one.conv1.weight, two.conv1.weight)


def test_evaluating_a_prepared_model_moves_no_range_and_no_statistic():
    net = NETS["residual"]
    batches = net.batches(3)
    _, prepared = trained(net.model(), batches, qat_recipe())
    before, norm = qparams(prepared), prepared.conv1.bn.running_mean.clone()
    prepared.eval()
    with torch.no_grad():
        prepared(batches[0] * 50)
    assert same(qparams(prepared), before)
    prepared.train()
    prepared(batches[0] * 50)
    assert not same(qparams(prepared), before)
    assert not torch.equal(prepared.conv1.bn.running_mean, norm)


def test_a_copy_of_a_prepared_model_keeps_its_ways_and_converts():
    net = NETS["residual"]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, qat_recipe("learnable"))
    twin = copy.deepcopy(prepared)
    before = qparams(twin)
    with torch.no_grad():
        twin.eval()(batches[0] * 50)
    assert same(qparams(twin), before)
    assert db(compiled.convert(prepared), compiled.convert(twin), batches[0]) > 100


def test_a_checkpoint_goes_on_in_a_freshly_prepared_model():
    net = NETS["residual"]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, qat_recipe())
    resumed = compiled.prepare()
    resumed.load_state_dict(prepared.state_dict())
    assert same(qparams(resumed), qparams(prepared))
    assert db(prepared.eval(), resumed.eval(), batches[0]) > 100


def test_converting_keeps_the_prepared_model_usable_and_gives_the_same_twice():
    net = NETS["residual"]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, qat_recipe())
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    first, second = compiled.convert(prepared), compiled.convert(prepared)
    assert prepared.training
    after = prepared.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(first(batches[0]), second(batches[0]))
    train(prepared, batches)


def test_a_fake_quant_that_was_switched_off_is_converted_all_the_same():
    net = NETS["mlp"]
    batches = net.batches(3)
    compiled, prepared = trained(net.model(), batches, qat_recipe())
    expected = compiled.convert(prepared)(batches[0])
    prepared.apply(lambda m: m.disable_fake_quant() if isinstance(m, FakeQuantizeBase) else None)
    assert torch.equal(compiled.convert(prepared)(batches[0]), expected)


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


# --- what training mode adds


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, self.training))


def test_a_dropout_function_drops_in_training_mode_and_not_in_eval_mode():
    batch = torch.randn(8, 6)
    compiled = qrecipe.compile(Dropping().eval(), qat_recipe(), batch)
    prepared = compiled.prepare()
    assert not torch.equal(prepared(batch), prepared(batch))
    prepared.eval()
    assert torch.equal(prepared(batch), prepared(batch))
    converted = compiled.convert(prepared)
    assert torch.equal(converted(batch), converted(batch))
    assert db(prepared, converted, batch) > 25


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6))
        self.inner = net_of(
            lambda self, x: self.fc(x) * 2 if self.training else self.fc(x), fc=nn.Linear(6, 3)
        )

    def forward(self, x):
        return self.inner(self.body(x))


def test_outputs_that_only_training_gives_are_warned_about():
    model = net_of(
        lambda self, x: (self.fc(x), x) if self.training else self.fc(x), fc=nn.Linear(6, 6)
    )
    with pytest.warns(qrecipe.QRecipeWarning, match="QR205"):
        plan = qrecipe.plan(model, qat_recipe(), torch.randn(4, 6))
    (warning,) = [w for w in plan.warnings if w.code == "QR205"]
    assert warning.message.startswith("the model's own forward behaves differently in training")


def test_a_forward_that_branches_on_training_is_warned_about_with_its_name():
    model, batch = Auxiliary().eval(), torch.randn(4, 6)
    with pytest.warns(qrecipe.QRecipeWarning, match="QR205"):
        plan = qrecipe.plan(model, qat_recipe(), batch)
    assert [w.message for w in plan.warnings if w.code == "QR205"] == [
        "the forward of inner behaves differently in training mode; only its eval branch is trained"
    ]
    ptq = qrecipe.plan(model, "builtin:x86-static", batch)
    assert "QR205" not in {w.code for w in ptq.warnings}
    dropping = qrecipe.plan(Dropping().eval(), qat_recipe(), batch)
    assert "QR205" not in {w.code for w in dropping.warnings}


def test_a_transposed_convolution_and_its_batch_norm_stay_apart_in_training():
    model = net_of(
        lambda self, x: self.bn(self.up(self.conv(x))),
        conv=nn.Conv2d(3, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 2),
        bn=nn.BatchNorm2d(4),
    )
    batches = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    ptq = sites(qrecipe.plan(model, "builtin:x86-static", batches[0]))
    assert ptq["up"].op == "ConvTranspose2d+BatchNorm2d"
    compiled, prepared = trained(model, batches, qat_recipe())
    assert [s.op for s in compiled.plan.sites] == ["Conv2d", "ConvTranspose2d", "BatchNorm2d"]
    assert db(prepared.eval(), compiled.convert(prepared), batches[0]) > 25


def test_what_torch_cannot_fuse_is_an_error_of_ours(monkeypatch):
    def fail(*args):
        raise NotImplementedError("no such fusion")

    monkeypatch.setattr("qrecipe.model.graph_sites.fuse", fail)
    with pytest.raises(PlanError, match="torch cannot fuse the model: no such fusion"):
        qrecipe.plan(nn.Sequential(nn.Linear(4, 4)).eval(), qat_recipe(), torch.randn(2, 4))


@pytest.mark.parametrize("phase", ["ptq", "qat"])
def test_a_preparation_in_which_torch_fails_is_an_error_of_the_plan(phase, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no such observer")

    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static"\nphase = "{phase}"\n'
    )
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    compiled = qrecipe.compile(model, recipe, torch.randn(2, 4))
    monkeypatch.setattr("qrecipe.execution.fx.convert.prepare", fail)
    with pytest.raises(PlanError, match="torch cannot prepare the model: no such observer"):
        compiled.prepare()


def test_parts_of_a_model_are_trained_in_place():
    model = net_of(
        lambda self, x: self.head(self.body(x)) if x.sum() > -1e9 else x,
        body=nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        head=nn.Linear(6, 3),
    )
    recipe = qat_recipe(rules='[fx]\nroots = ["body"]\n')
    batches = [torch.randn(4, 6) for _ in range(3)]
    compiled, prepared = trained(model, batches, recipe)
    assert prepared.training
    assert not torch.equal(prepared.head.weight, model.head.weight)
    converted = compiled.convert(prepared)
    assert ".quantized." in type(converted.body.get_submodule("0")).__module__
    assert db(prepared.eval(), converted, batches[0]) > 25


# --- ranges before and without training


def test_calibration_gives_the_ranges_to_start_training_from():
    net = NETS["residual"]
    batches = net.batches(12)
    compiled = qrecipe.compile(net.model(), qat_recipe("learnable"), batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    assert prepared.training
    assert all(m.fake_quant_enabled[0] == 1 for m in fake_quants(prepared).values())
    assert torch.equal(prepared.conv1.bn.running_mean, net.model().bn1.running_mean)
    assert db(net.model(), compiled.convert(prepared), batches[0]) > 15


def test_a_failed_calibration_leaves_ranges_as_they_were():
    net = NETS["mlp"]
    batches = net.batches(3)
    _, prepared = trained(net.model(), batches, qat_recipe("learnable"))
    before = qparams(prepared)
    scale = prepared.fc1.weight_fake_quant.scale
    with pytest.raises(CalibrationError, match="NaN"):
        qrecipe.calibrate(prepared, [batches[0] * 9, batches[0] * torch.nan], progress=silent)
    assert same(qparams(prepared), before)
    assert prepared.fc1.weight_fake_quant.scale is scale


def test_a_model_that_never_saw_a_batch_is_not_converted():
    net = NETS["residual"]
    compiled = qrecipe.compile(net.model(), qat_recipe(), net.batches(1)[0])
    with pytest.raises(CalibrationError, match="never saw a batch"):
        compiled.convert(compiled.prepare())


def test_a_training_that_diverged_is_not_converted():
    net = NETS["mlp"]
    compiled, prepared = trained(net.model(), net.batches(3), qat_recipe())
    with torch.no_grad():
        prepared.fc1.weight.fill_(torch.nan)
    prepared(net.batches(1)[0])
    with pytest.raises(CalibrationError, match="fc1") as caught:
        compiled.convert(prepared)
    assert {finding.code for finding in caught.value.findings} == {"QR404"}
    named = {finding.message.partition(" gives ")[0] for finding in caught.value.findings}
    assert {"the fake-quant of the weights of fc1", "the fake-quant of fc1"} <= named
    assert not [name for name in named if "activation_post_process" in name]


def test_quantize_shows_the_lines_that_training_takes():
    net = NETS["mlp"]
    with pytest.raises(PlanError) as caught:
        qrecipe.quantize(net.model(), qat_recipe(), net.batches())
    (finding,) = caught.value.findings
    assert finding.code == "QR308"
    assert "prepared = compiled.prepare()" in finding.notes


def test_one_recipe_serves_both_phases():
    text = qat_recipe().to_toml()
    net = NETS["mlp"]
    plain = qrecipe.parse_recipe(text.replace('phase = "qat"', 'phase = "ptq"'))
    batches = net.batches(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QRecipeWarning)
        warnings.filterwarnings("ignore", "QR234", QRecipeWarning)
        converted = qrecipe.quantize(net.model(), plain, batches, progress=silent)
    assert db(net.model(), converted, batches[0]) > 20
    compiled, prepared = trained(net.model(), batches, qrecipe.parse_recipe(text))
    assert compiled.convert(prepared)(batches[0]).isfinite().all()


# --- dynamic and weight-only sites, ties, and evaluation before training


def test_evaluation_before_the_first_batch_gives_the_float_model():
    """As loops do to check themselves: there is no range to round to yet."""
    for kind in KINDS:
        net = NETS["residual"]
        batch = net.batches(1)[0]
        prepared = qrecipe.compile(net.model(), qat_recipe(kind), batch).prepare().eval()
        assert db(net.model(), prepared, batch) > 80
        assert all(m.fake_quant_enabled[0] == 1 for m in fake_quants(prepared).values())


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


def test_only_dropout_that_follows_training_drops():
    never = net_of(
        lambda self, x: self.b(F.dropout(self.a(x), 0.5, training=False)),
        a=nn.Linear(6, 64),
        b=nn.Linear(64, 3),
    )
    follows = net_of(
        lambda self, x: self.b(torch.dropout(self.a(x), 0.5, self.training)),
        a=nn.Linear(6, 64),
        b=nn.Linear(64, 3),
    )
    batch = torch.randn(8, 6)
    for model, drops in ((never, False), (follows, True)):
        prepared = qrecipe.compile(model, qat_recipe(), batch).prepare()
        prepared(batch)
        for module in fake_quants(prepared).values():
            module.disable_observer()
        assert (not torch.equal(prepared(batch), prepared(batch))) is drops


def test_a_learnable_scale_that_collapsed_is_named():
    net = NETS["mlp"]
    compiled, prepared = trained(net.model(), net.batches(3), qat_recipe("learnable"))
    with torch.no_grad():
        prepared.fc1.weight_fake_quant.scale.fill_(-1.0)
    with pytest.raises(CalibrationError, match="collapsed"):
        compiled.convert(prepared)


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


class Noisy(nn.Linear):
    """Adds noise while training."""

    def forward(self, x):
        x = super().forward(x)
        return x + torch.randn(6) if self.training else x


def test_noise_that_a_trained_graph_lacks_is_warned_about():
    model = nn.Sequential(nn.Linear(6, 6), Noisy(6, 6), nn.Linear(6, 2)).train()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        qrecipe.compile(model, qat_recipe(), torch.randn(4, 6))
    ours = [each for each in found if issubclass(each.category, qrecipe.QRecipeWarning)]
    assert [str(each.message)[:5] for each in ours] == ["QR205"]  # training mode is as it should be
    assert "the forward of 1" in str(ours[0].message)
