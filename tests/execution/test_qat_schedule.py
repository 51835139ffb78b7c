"""The schedule of training: rates, what is frozen when, and resuming."""

from __future__ import annotations

import math

import pytest
import torch
from nets import NETS
from plans import net_of
from torch import nn
from torch.ao.quantization import FakeQuantizeBase
from torch.optim.lr_scheduler import LRScheduler
from training import qat_recipe

import qrecipe
from qrecipe.errors.findings import CalibrationError, PlanError


def prepared_for(name="residual", **keys):
    net = NETS[name]
    recipe = qat_recipe(**keys)
    return qrecipe.compile(net.model(), recipe, net.batches(1)[0]).prepare(), net.batches()


def scheduled(prepared, steps, rate=0.5):
    optimizer = torch.optim.SGD(prepared.parameters(), lr=rate)
    return optimizer, qrecipe.qat_schedule(prepared, optimizer, original_steps=steps)


def run(prepared, batches, optimizer, schedule, steps):
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        prepared(batches[step % len(batches)]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return rates


def observing(prepared):
    return {
        bool(m.observer_enabled[0]) for m in prepared.modules() if isinstance(m, FakeQuantizeBase)
    }


def test_it_takes_a_tenth_of_the_steps_and_anneals_from_a_hundredth_of_the_rate():
    prepared, batches = prepared_for()
    optimizer, schedule = scheduled(prepared, 200)
    assert isinstance(schedule, LRScheduler)
    assert schedule.total_steps == 20
    rates = run(prepared, batches, optimizer, schedule, 20)
    expected = [0.005 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert rates == pytest.approx(expected)
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    run(prepared, batches, optimizer, schedule, 3)
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("shape", "rates"), [("linear", [0.04, 0.03, 0.02, 0.01]), ("constant", [0.04] * 4)]
)
def test_the_recipe_sets_shape_and_fractions(shape, rates):
    table = f'schedule = "{shape}"\nepochs_fraction = 0.4\nlearning_rate_fraction = 0.1\n'
    prepared, batches = prepared_for(rules=f"[qat]\n{table}")
    optimizer, schedule = scheduled(prepared, 10, rate=0.4)
    assert schedule.total_steps == 4
    assert run(prepared, batches, optimizer, schedule, 4) == pytest.approx(rates)


def test_each_group_of_parameters_is_annealed_from_its_own_rate():
    prepared, _ = prepared_for()
    first, *others = prepared.parameters()
    groups = [{"params": [first], "lr": 1.0}, {"params": others, "lr": 0.1}]
    schedule = qrecipe.qat_schedule(prepared, torch.optim.SGD(groups), original_steps=100)
    assert schedule.get_last_lr() == pytest.approx([0.01, 0.001])


def test_observers_and_statistics_are_frozen_at_their_fractions():
    prepared, batches = prepared_for()
    optimizer, schedule = scheduled(prepared, 100)
    run(prepared, batches, optimizer, schedule, 5)
    assert observing(prepared) == {True}
    run(prepared, batches, optimizer, schedule, 1)
    assert observing(prepared) == {False}
    norm = prepared.conv1.bn
    before = norm.running_mean.clone()
    run(prepared, batches, optimizer, schedule, 2)
    assert not torch.equal(norm.running_mean, before)
    frozen = norm.running_mean.clone()
    prepared.train()  # as at the start of an epoch
    run(prepared, batches, optimizer, schedule, 2)
    assert torch.equal(norm.running_mean, frozen)


def test_a_batch_norm_that_is_not_fused_is_frozen_too():
    model = net_of(
        lambda self, x: self.fc(self.bn(torch.sigmoid(self.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 2),
    )
    batches = [torch.randn(4, 3, 5, 5) for _ in range(3)]
    prepared = qrecipe.compile(model, qat_recipe(), batches[0]).prepare()
    assert type(prepared.bn) is nn.BatchNorm2d
    optimizer, schedule = scheduled(prepared, 10)
    run(prepared, batches, optimizer, schedule, 1)
    before = prepared.bn.running_mean.clone()
    prepared.train()
    run(prepared, batches, optimizer, schedule, 2)
    assert torch.equal(prepared.bn.running_mean, before)


def test_learnable_scales_go_on_learning_when_observers_stop():
    rules = '[qat]\nschedule = "constant"\n'
    prepared, batches = prepared_for("mlp", kind="learnable", rules=rules)
    optimizer, schedule = scheduled(prepared, 40, rate=1.0)
    run(prepared, batches, optimizer, schedule, 3)
    scale = prepared.fc1.weight_fake_quant.scale
    before = scale.detach().clone()
    run(prepared, batches, optimizer, schedule, 1)
    assert not torch.equal(scale, before)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped():
    results = []
    for stop in (None, 7):
        torch.manual_seed(0)
        prepared, batches = prepared_for()
        optimizer, schedule = scheduled(prepared, 100)
        run(prepared, batches, optimizer, schedule, stop or 10)
        if stop is not None:
            state = [x.state_dict() for x in (prepared, optimizer, schedule)]
            assert all(isinstance(v, (int, float, bool, list)) for v in state[2].values())
            prepared, batches = prepared_for()
            optimizer, schedule = scheduled(prepared, 100)
            for fresh, saved in zip((prepared, optimizer, schedule), state, strict=True):
                fresh.load_state_dict(saved)
            assert observing(prepared) == {False}
            later = batches[stop % len(batches) :] + batches
            run(prepared, later, optimizer, schedule, 10 - stop)
        results.append(prepared.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_state_of_another_length_is_refused():
    prepared, _ = prepared_for()
    _, long = scheduled(prepared, 200)
    _, short = scheduled(prepared, 100)
    with pytest.raises(PlanError, match="20 steps, not of 10"):
        short.load_state_dict(long.state_dict())


@pytest.mark.parametrize("state", [None, [1], {}])
def test_what_is_no_state_of_a_schedule_is_refused(state):
    prepared = qrecipe.compile(NETS["mlp"].model(), qat_recipe(), torch.zeros(2, 6)).prepare()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1.0)
    with pytest.raises(PlanError, match="QR313"):
        qrecipe.qat_schedule(prepared, optimizer, original_steps=10).load_state_dict(state)


def test_an_optimizer_that_would_train_another_model_is_refused():
    model = NETS["mlp"].model()
    before = torch.optim.SGD(model.parameters(), lr=1.0)
    prepared = qrecipe.compile(model, qat_recipe(), torch.zeros(2, 6)).prepare()
    with pytest.raises(PlanError, match="QR313 the optimizer has no parameter of the prepared"):
        qrecipe.qat_schedule(prepared, before, original_steps=10)
    with pytest.raises(PlanError, match="QR313 the optimizer is a NoneType"):
        qrecipe.qat_schedule(prepared, None, original_steps=10)


def test_the_wrapper_of_a_prepared_model_will_do():
    prepared, _ = prepared_for()
    wrapped = nn.DataParallel(prepared)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    assert qrecipe.qat_schedule(wrapped, optimizer, original_steps=10).total_steps == 1


def test_models_and_steps_that_do_not_fit_are_refused():
    net = NETS["mlp"]
    optimizer = torch.optim.SGD(net.model().parameters(), lr=1.0)
    with pytest.raises(CalibrationError, match="was not prepared by qrecipe"):
        qrecipe.qat_schedule(net.model(), optimizer, original_steps=10)
    calibrated = qrecipe.compile(net.model(), "builtin:x86-static", net.batches(1)[0]).prepare()
    with pytest.raises(PlanError, match="for calibration, not for training"):
        qrecipe.qat_schedule(calibrated, optimizer, original_steps=10)
    prepared, _ = prepared_for("mlp")
    for steps in (0, -1, 2.5):
        with pytest.raises(PlanError, match="not a positive number"):
            qrecipe.qat_schedule(prepared, optimizer, original_steps=steps)


def test_observers_see_one_batch_at_least_and_calibration_sees_behind_the_schedule():
    rules = "[qat]\ndisable_observer_after = 0.0\n"
    for calibrates in (False, True):
        prepared, batches = prepared_for("mlp", rules=rules)
        optimizer, schedule = scheduled(prepared, 40)
        if calibrates:
            qrecipe.calibrate(prepared, batches, progress=lambda done, total: None)
        run(prepared, batches, optimizer, schedule, 1)
        assert observing(prepared) == {False}
        scale = prepared.activation_post_process_0.scale
        assert scale != 1


def test_any_kind_of_integer_counts_steps():
    prepared, _ = prepared_for("mlp")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1.0)
    steps = pytest.importorskip("numpy").int64(50)
    assert qrecipe.qat_schedule(prepared, optimizer, original_steps=steps).total_steps == 5
