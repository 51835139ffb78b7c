"""Models that are prepared for training, and their ranges before any training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from differential import snapshot
from nets import NETS
from runs import silent
from torch.ao.quantization import FakeQuantizeBase
from training import KINDS, db, fake_quants, qat_recipe, qparams, same, train, trained

import qrecipe
from qrecipe.errors.findings import (
    CalibrationError,
    PlanError,
    QRecipeWarning,
)


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


# --- ranges before and without training


def test_evaluation_before_the_first_batch_gives_the_float_model():
    """As loops do to check themselves: there is no range to round to yet."""
    for kind in KINDS:
        net = NETS["residual"]
        batch = net.batches(1)[0]
        prepared = qrecipe.compile(net.model(), qat_recipe(kind), batch).prepare().eval()
        assert db(net.model(), prepared, batch) > 80
        assert all(m.fake_quant_enabled[0] == 1 for m in fake_quants(prepared).values())


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
