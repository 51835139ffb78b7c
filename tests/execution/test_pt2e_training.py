"""Training programs of torch.export: what FX graph mode trains, with its norms and drops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from differential import snapshot
from nets import NETS
from plans import net_of
from programs import QCONFIGS
from shares import every
from torch import nn
from training import KINDS, db, fake_quants, qat_recipe, train

import qrecipe
from qrecipe._torch_ao import FakeQuantizeBase
from qrecipe.errors.findings import CalibrationError, ExecutionError, PlanError, QRecipeWarning
from qrecipe.registry import table as registered

pytest.importorskip("torchao")

from qrecipe.execution.pt2e import part as part_module
from qrecipe.execution.pt2e import training as training_module

BASE = "builtin:arm-static"


def trained(model, batches, recipe=None, *, executor="pt2e", steps=0, calibrated=False):
    recipe = recipe or qat_recipe(base=BASE)
    compiled = qrecipe.compile(model, recipe, batches[0], executor=executor)
    prepared = compiled.prepare()
    if calibrated:
        qrecipe.calibrate(prepared, batches)
    torch.manual_seed(0)
    train(prepared, batches[: steps or None], rate=1e-3)
    return compiled, prepared


def settled(model):
    """With statistics and weights of norms as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def drops(self, x):
    x = self.drop(torch.relu(self.one(self.drop(x))))
    x = torch.cat([x, F.dropout(x * 2, 0.3, self.training)], 1)
    return self.two(x)


def images():
    return torch.randn(4, 3, 6, 6)


def rows():
    return torch.randn(16, 6)


KEPT = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
NORMS_AND_DROPS = {
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4, eps=0.1, momentum=None),
            nn.ReLU(),
            nn.Conv2d(4, 4, 1),
        ),
        images,
    ),
    "not_affine": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False)),
        lambda: torch.randn(4, 3, 8),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        rows,
    ),
    "apart": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), images),
    "before": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)), images),
    "of_samples": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(KEPT)), images),
    "drops": (
        lambda: net_of(drops, one=nn.Linear(6, 6), two=nn.Linear(12, 3), drop=nn.Dropout(0.5)),
        rows,
    ),
    "recurrent": (
        lambda: net_of(
            lambda self, x: self.fc(self.lstm(x)[0]),
            lstm=nn.LSTM(6, 4, 2, dropout=0.5, batch_first=True),
            fc=nn.Linear(4, 3),
        ),
        lambda: torch.randn(4, 5, 6),
    ),
}


def small():
    make, batch = NORMS_AND_DROPS["convolution"]
    return settled(make()), [batch() for _ in range(4)]


@pytest.mark.parametrize("name", every(3, NORMS_AND_DROPS))
def test_it_trains_as_fx_trains(name):
    make, batch = NORMS_AND_DROPS[name]
    model = settled(make())
    batches = [batch() for _ in range(4)]
    rules = '[rules.module_name]\n"lstm" = "float"\n' if name == "recurrent" else ""
    recipe = qat_recipe(base=BASE, rules=rules)
    outputs = []
    for executor in ("fx", "pt2e"):
        compiled, prepared = trained(model, batches, recipe, executor=executor)
        converted = compiled.convert(prepared)
        outputs.append(qrecipe.Inputs.from_batch(batches[1]).call(prepared.eval()).detach())
        assert db(prepared, converted, batches[1]) > 30
    difference = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    assert difference < 0.04
    targets = {str(node.target) for node in converted.graph.nodes if node.op == "call_module"}
    assert targets <= {"_guards_fn"}


@pytest.mark.parametrize(
    "name",
    every(
        16,
        sorted(NETS.keys() - {"shared_conv_two_norms", "recurrent", "cnn_lstm", "cells"}),
        first=3,
    ),
)
def test_the_converted_program_computes_what_the_trained_one_computes(name, tmp_path):
    net = NETS[name]
    model, batches = net.model(), net.batches(3)
    compiled, prepared = trained(model, batches)
    converted = compiled.convert(prepared)
    assert db(prepared.eval(), converted, batches[1]) > 30
    qrecipe.save_quantized(converted, tmp_path / "m.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model)
    assert db(converted, loaded, batches[1]) == float("inf")


@pytest.mark.parametrize("kind", every(3, sorted(KINDS.keys() - {"fake_quantize"}), first=1))
def test_every_kind_of_fake_quant_trains(kind):
    model, batches = small()
    compiled, prepared = trained(model, batches, qat_recipe(kind, base=BASE))
    least = 20 if kind == "fused_moving_average" else 30
    assert db(prepared.eval(), compiled.convert(prepared), batches[1]) > least


def test_a_prepared_program_is_a_good_citizen():
    model, batches = small()
    before = snapshot(model)
    compiled, prepared = trained(model, batches)
    assert snapshot(model) == before
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in prepared.state_dict().values())
    state = copy.deepcopy(prepared.state_dict())
    again = compiled.prepare()
    again.load_state_dict(state)
    assert db(prepared.eval(), again.eval(), batches[1]) == float("inf")
    assert db(prepared, copy.deepcopy(prepared), batches[1]) == float("inf")
    with torch.no_grad():
        results = [compiled.convert(each)(batches[1]) for each in (prepared, prepared, again)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert prepared.train()(batches[0]).requires_grad


def test_the_schedule_freezes_ranges_and_statistics():
    model, batches = small()
    compiled = qrecipe.compile(model, qat_recipe(base=BASE), batches[0], executor="pt2e")
    prepared = compiled.prepare()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    schedule = qrecipe.qat_schedule(prepared, optimizer, original_steps=100)
    seen = []
    for step in range(schedule.total_steps):
        prepared(batches[step % 4]).sum().backward()
        optimizer.step()
        schedule.step()
        norm = prepared.get_submodule("0.norm")
        observing = {bool(each.observer_enabled[0]) for each in fake_quants(prepared).values()}
        prepared.train()
        seen.append((observing, norm.running_mean.clone()))
    assert seen[4][0] == {True}
    assert seen[6][0] == {False}
    assert not torch.equal(seen[6][1], seen[7][1])
    assert torch.equal(seen[8][1], seen[9][1])
    assert db(prepared.eval(), compiled.convert(prepared), batches[0]) > 30


class Stepwise(FakeQuantizeBase):
    """A fake-quant of a plugin."""

    def __init__(self, observer, quant_min=None, quant_max=None, **arguments):
        super().__init__()
        self.activation_post_process = observer(
            quant_min=quant_min, quant_max=quant_max, **arguments
        )
        self.dtype = self.activation_post_process.dtype
        self.qscheme = self.activation_post_process.qscheme
        self.ch_axis = getattr(self.activation_post_process, "ch_axis", -1)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.calls = 0

    def calculate_qparams(self):
        return self.activation_post_process.calculate_qparams()

    def forward(self, x):
        self.calls += 1
        if self.observer_enabled[0]:
            self.activation_post_process(x.detach())
        scale, zero_point = self.calculate_qparams()
        if not self.fake_quant_enabled[0]:
            return x
        limits = self.quant_min, self.quant_max
        if self.ch_axis < 0:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
        zero_point = zero_point.int()
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, self.ch_axis, *limits)


@pytest.fixture
def stepwise():
    before = registered.snapshot()
    qrecipe.register_fake_quant("stepwise")(Stepwise)
    yield
    registered.restore(before)


def test_fake_quants_of_plugins_work_unchanged(stepwise):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    batches = [rows() for _ in range(3)]
    own = qrecipe.parse_recipe(
        f'format = 1\nextends = "{BASE}"\nphase = "qat"\n'
        '[tensor.activation]\nfake_quant = "stepwise"\n'
    )
    compiled, prepared = trained(model, batches, own)
    calls = [each.calls for each in prepared.modules() if isinstance(each, Stepwise)]
    assert calls == [3, 3, 3]
    assert db(prepared.eval(), compiled.convert(prepared), batches[1]) > 30


def test_dynamic_and_weight_only_layers_train():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    batches = [rows() for _ in range(3)]
    mixed = qat_recipe(
        rules=QCONFIGS
        + """
[rules]
global = "float"
[rules.module_name]
"0" = "dynamic"
"2" = "only"
"""
    )
    compiled, prepared = trained(model, batches, mixed)
    assert len(fake_quants(prepared)) == 3
    # in eval mode, the range of an input stays that of the last batch
    assert db(prepared.eval(), compiled.convert(prepared), batches[-1]) > 30


def test_what_cannot_be_trained_or_was_not_is_said():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    compiled = qrecipe.compile(model, qat_recipe(base=BASE), images(), executor="pt2e")
    with pytest.raises(CalibrationError, match="QR401"):
        compiled.convert(compiled.prepare())
    with torch.no_grad():
        model[1].weight[0] = 0
    with pytest.raises(PlanError, match=r"0 cannot be trained .* some are 0"):
        qrecipe.compile(model, qat_recipe(base=BASE), images(), executor="pt2e")


def test_modules_that_are_called_as_a_whole_do_not_drop_and_a_warning_says_so():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))).eval()
    whole = qat_recipe(base=BASE, head='[fx]\nnon_traceable_module_name = ["1"]\n')
    with pytest.warns(QRecipeWarning, match="QR205 1 has dropout in training mode"):
        qrecipe.compile(model, whole, rows(), executor="pt2e")


@pytest.mark.parametrize("where", ["weight", "activation"])
def test_a_fake_quant_that_diverged_is_named(where):
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    compiled, prepared = trained(model, [rows() for _ in range(3)], qat_recipe("learnable"))
    names = {"weight": "weight_observer", "activation": "activation_post_process"}
    (first, *_) = (m for n, m in fake_quants(prepared).items() if n.endswith(names[where]))
    with torch.no_grad():
        first.scale.fill_(float("nan"))
    said = {"weight": "the weights of 0", "activation": "the input of 0"}
    with pytest.raises(CalibrationError, match=f"QR404 the fake-quant of {said[where]} gives"):
        compiled.convert(prepared)


def test_norms_that_are_folded_wrongly_are_found(monkeypatch):
    compiled, prepared = trained(*small())
    honest = training_module._value

    def wrong(argument, program, known):
        return honest(argument, program, known) + (1 if known else 0)

    monkeypatch.setattr(training_module, "_value", wrong)
    with pytest.raises(ExecutionError, match=r"QR405 .* norms are folded"):
        compiled.convert(prepared)


def test_a_fake_quant_that_stayed_in_is_found(monkeypatch):
    compiled, prepared = trained(*small())
    honest = part_module.convert_pt2e

    def wrong(program):
        adapters = [n for n, m in program.named_modules() if type(m).__name__ == "Adapter"]
        program.set_submodule(adapters[-1], program.get_submodule(adapters[-1]).observer)
        return honest(program)

    monkeypatch.setattr(part_module, "convert_pt2e", wrong)
    with pytest.raises(qrecipe.AuditError, match="QR410"):
        compiled.convert(prepared)
