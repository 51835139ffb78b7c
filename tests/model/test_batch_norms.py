"""A BatchNorm is folded or fused however it is written, in calibration and in training."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from norms import (
    ARITHMETIC,
    SPELLINGS,
    Frozen,
    Function,
    InSteps,
    NormAct,
    Spelt,
    norm_net,
    warmed,
)
from plans import net_of, recipe, sites
from shares import every
from torch import nn
from training import qat_recipe, train

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db

BATCH = torch.rand(4, 3, 8, 8)
TRAINED = ("activation inside", "cumulative", "by position")


def made(spelling):
    torch.manual_seed(0)
    return warmed(norm_net(SPELLINGS[spelling](8)), BATCH)


def respelt(model):
    """The same model with torch's own BatchNorm and ReLU."""
    norm = model[1]
    momentum, affine = getattr(norm, "momentum", 0.1), getattr(norm, "affine", True)
    own = nn.BatchNorm2d(8, momentum=momentum, affine=affine).eval()
    buffers = {"mean": "running_mean", "var": "running_var"}
    parameters = {"scale": "weight", "shift": "bias"}
    for name, tensor in copy.deepcopy(norm.state_dict()).items():
        getattr(own, {**buffers, **parameters}.get(name, name)).data.copy_(tensor)
    has_relu = isinstance(norm, nn.BatchNorm2d) and type(norm).__name__ != "Renamed"
    return nn.Sequential(model[0], own, *([nn.ReLU()] if has_relu else []), *model[2:]).eval()


def quantized(model, batch=BATCH, phase="ptq"):
    compiled = qrecipe.compile(model, recipe(head=f'phase = "{phase}"'), batch)
    prepared = compiled.prepare()
    if phase == "ptq":
        qrecipe.calibrate(prepared, [batch] * 10)
    else:
        train(prepared, [batch, batch + 1], rate=1e-2)
    return compiled.plan, compiled.convert(prepared)


@pytest.mark.parametrize(
    "case",
    [*every(2, product(SPELLINGS, ["ptq"])), *every(3, product(TRAINED, ["qat"]))],
    ids="-".join,
)
def test_a_batch_norm_is_fused_in_every_spelling_as_torchs_own_module_is(case, tmp_path):
    spelling, phase = case
    model = made(spelling)
    plan, converted = quantized(model, phase=phase)
    own_plan, own = quantized(respelt(model), phase=phase)
    assert [site.verdict for site in plan] == ["quantized", "quantized"]
    assert plan["0"].op.startswith("Conv2d+batch_norm")
    assert plan.boundaries == own_plan.boundaries == 2
    assert torch.equal(converted(BATCH), own(BATCH))
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(BATCH), converted(BATCH))


def test_identities_and_dropouts_between_a_convolution_and_its_activation_are_no_hindrance():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Identity(), NormAct(8, nn.Identity), nn.Dropout(0.1), nn.ReLU()
    ).eval()
    plan = qrecipe.plan(model, recipe(), BATCH)
    assert [site.members for site in plan] == [("0", "2:batch_norm", "4")]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 1), (2, 3, 5)),
        (nn.Conv3d(3, 4, 1), (2, 3, 5, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 2), (2, 3, 5, 5)),
        (nn.Linear(3, 4), (5, 3)),
    ],
)
def test_every_layer_that_torch_fuses_takes_the_function_too(layer, shape):
    model = warmed(nn.Sequential(layer, SPELLINGS["by position"](4)), torch.rand(shape))
    plan = qrecipe.plan(model, recipe(), torch.rand(shape))
    assert [site.op for site in plan] == [f"{type(layer).__name__}+batch_norm"]


class OwnConv(nn.Conv2d):
    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


OWN_LAYERS = {
    "subclass": (type("Conv", (nn.Conv2d,), {})(3, 8, 3), nn.BatchNorm2d(8)),
    "own forward": (OwnConv(3, 9, 3, groups=3, bias=False), NormAct(9)),
    "arithmetic": (OwnConv(3, 8, 3, stride=2), Frozen(8)),
    "transposed": (
        type("Transposed", (nn.ConvTranspose2d,), {})(3, 8, 2, 2, groups=1),
        nn.BatchNorm2d(8),
    ),
    "linear": (type("Linear", (nn.Linear,), {})(3, 8), nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize(
    ("case", "phase"),
    [
        *((case, "ptq") for case in OWN_LAYERS),
        *(
            pytest.param(case, "qat", marks=[] if case == "own forward" else [pytest.mark.slow])
            for case in OWN_LAYERS
        ),
    ],
)
def test_a_batch_norm_is_folded_into_a_layer_that_is_a_function(case, phase, tmp_path):
    torch.manual_seed(0)
    batch = torch.rand(6, 3) if case == "linear" else BATCH
    model = warmed(nn.Sequential(*OWN_LAYERS[case]), batch)
    plan, converted = quantized(model, batch, phase)
    (site,) = (site for site in plan if site.qconfig is not None and site.qconfig.weight)
    is_apart = case == "transposed" and phase == "qat"
    assert (len(site.members) > 1) is not is_apart
    assert plan.boundaries == 2
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(batch), converted(batch))


def test_a_function_over_another_axis_than_that_of_the_features_is_left_apart(tmp_path):
    batch = torch.rand(2, 4, 3)
    model = warmed(nn.Sequential(nn.Linear(3, 4), SPELLINGS["by position"](4)), batch)
    plan, converted = quantized(model, batch)
    assert [site.verdict for site in plan] == ["quantized", "float"]
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(batch), converted(batch))


def test_a_batch_norm_before_its_convolution_has_a_kernel_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), NormAct(8), nn.Conv2d(8, 4, 1)).eval()
    plan = qrecipe.plan(model, recipe(), BATCH)
    assert sites(plan)["2:batch_norm"].op == "batch_norm+ReLU"
    assert {site.verdict for site in plan} == {"quantized"}


def test_a_synchronised_batch_norm_is_a_plain_one_outside_training():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(norm_net(nn.BatchNorm2d(8))).eval()
    plan, converted = quantized(model)
    assert plan["0"].members == ("0", "1")
    assert converted(BATCH).isfinite().all()


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d(3, 8, 2, 2), nn.BatchNorm1d, (4, 3, 8)),
    "2d": (nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d, (4, 3, 8, 8)),
    "3d": (nn.ConvTranspose3d(3, 8, 2, 2), nn.BatchNorm3d, (4, 3, 4, 4, 4)),
    "in groups": (nn.ConvTranspose2d(4, 8, 2, 2, groups=2), NormAct, (4, 4, 8, 8)),
}


@pytest.mark.parametrize("case", every(2, TRANSPOSED))
def test_a_batch_norm_is_folded_into_a_transposed_convolution_whatever_follows(case):
    layer, norm, shape = TRANSPOSED[case]
    batch = torch.rand(shape)
    for rest in ([nn.ReLU()], [nn.Dropout(), nn.ReLU6()], [nn.Identity()]):
        model = warmed(nn.Sequential(copy.deepcopy(layer), norm(8), *rest), batch)
        plan, converted = quantized(model, batch)
        assert len(plan["0"].members) == 2
        assert plan.boundaries == 2
        assert output_sqnr_db(model(batch), converted(batch)) > 30


def test_in_training_a_transposed_convolution_and_its_batch_norm_are_apart_and_the_plan_says_why():
    layers = (nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU())
    plan, converted = quantized(warmed(nn.Sequential(*layers), BATCH), phase="qat")
    assert [site.members for site in plan] == [("0",), ("1",), ("3",)]
    reason = "not folded: torch cannot train a transposed convolution and its BatchNorm as one"
    assert plan["1"].reason == f"{reason}; with the range of 3, which clamps it"
    assert converted(BATCH).isfinite().all()


SYNCHRONISED = {
    "fused": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "cumulative": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None, affine=False)),
    "with its activation": (nn.Hardswish(), nn.BatchNorm2d(3), nn.ReLU()),
    "alone": (nn.Hardswish(), nn.BatchNorm2d(3)),
    "after a linear layer": (nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize("case", every(2, SYNCHRONISED))
def test_a_synchronised_batch_norm_is_trained_synchronised_and_converted_as_a_plain_one(case):
    def results(model):
        compiled = qrecipe.compile(model, recipe(head='phase = "qat"'), BATCH)
        prepared = compiled.prepare()
        kinds = {type(each) for each in prepared.modules()}
        train(prepared, [BATCH, BATCH + 1], rate=1e-2)
        return compiled.plan, kinds, compiled.convert(prepared)(BATCH)

    torch.manual_seed(0)
    model = warmed(nn.Sequential(*copy.deepcopy(SYNCHRONISED[case])), BATCH)
    in_sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    (plan, kinds, output), (own_plan, own_kinds, expected) = results(in_sync), results(model)
    assert [site.members for site in plan] == [site.members for site in own_plan]
    assert nn.SyncBatchNorm in kinds
    assert nn.SyncBatchNorm not in own_kinds
    assert torch.equal(output, expected)
    assert any(isinstance(each, nn.SyncBatchNorm) for each in in_sync.modules())


def test_reading_a_shape_does_not_keep_operations_apart():
    def forward(self, x):
        x = self.conv(x)
        torch._assert(x.dim() == 4, "expected 4 dimensions")
        rows = x.shape[2]
        x = F.relu(self.norm(x))
        return x.reshape(x.size(0), -1, rows)

    model = net_of(forward, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8))
    plan = qrecipe.plan(model, recipe(), BATCH)
    assert [site.members for site in plan] == [("conv", "norm", ":relu"), (":reshape",)]


def test_what_a_model_asserts_is_still_asserted():
    model = net_of(
        lambda self, x: self.norm(_small(self.conv(x))), conv=nn.Conv2d(3, 8, 3), norm=NormAct(8)
    )
    plan, converted = quantized(model)
    assert len(plan) == 1
    with pytest.raises(AssertionError, match="too many"):
        converted(torch.rand(9, 3, 8, 8))


def _small(x):
    torch._assert(x.size(0) < 9, "too many")
    return x


REASONS = {
    "of each batch": (NormAct(8, track_running_stats=False), "ptq", "statistics of each batch"),
    "computed": (
        Function(8, lambda self, x: F.batch_norm(x, x.mean((0, 2, 3)), self.var)),
        "ptq",
        "its running_mean is computed, not stored",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_fused_stays_float_with_the_reason(case):
    norm, phase, reason = REASONS[case]
    plan, converted = quantized(norm_net(norm).eval(), phase=phase)
    assert plan["1:batch_norm"].verdict == "float"
    assert reason in plan["1:batch_norm"].reason
    assert converted(BATCH).isfinite().all()


def test_calls_that_share_statistics_are_trained_apart_and_the_plan_says_what_they_miss():
    norm = NormAct(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1), norm).eval()
    with pytest.warns(qrecipe.QRecipeWarning, match="QR205"):
        plan = qrecipe.plan(model, qat_recipe(), BATCH)
    assert {site.reason for site in plan if "batch_norm" in site.op} == {
        "another call has the same statistics, and training cannot share them"
    }
    (warning,) = [each for each in plan.warnings if each.code == "QR205"]
    assert "the forward of 1 behaves differently" in warning.message
    assert {site.verdict for site in qrecipe.plan(model, recipe(), BATCH)} == {"quantized"}


@pytest.mark.parametrize(
    ("norm", "steps"),
    [(Frozen(8), [":mul", ":add"]), (InSteps(8), [":sub", ":div", ":mul", ":add"])],
)
def test_a_batch_norm_as_arithmetic_with_stored_tensors_is_folded(norm, steps, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU()).eval()
    plan, converted = quantized(model)
    assert [site.members for site in plan] == [("0", *(f"1{step}" for step in steps), "2")]
    assert output_sqnr_db(model(BATCH), converted(BATCH)) > 30
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(BATCH), converted(BATCH))
    trained, _ = quantized(model, phase="qat")
    assert trained["0"].members == plan["0"].members


@pytest.mark.parametrize("name", every(2, ARITHMETIC))
def test_arithmetic_with_parameters_is_folded_however_it_is_written(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Spelt(8, ARITHMETIC[name]), nn.ReLU())
    plan, converted = quantized(model.eval())
    assert [site.verdict for site in plan] == ["quantized"]
    assert plan.boundaries == 2
    assert output_sqnr_db(model(BATCH), converted(BATCH)) > 30


class Scaled(nn.Module):
    """What a layer gives, moved by ``move``, times a parameter of a shape, as LayerScale is."""

    def __init__(self, layer, move, *shape):
        super().__init__()
        self.layer, self.move = layer, move
        self.gamma = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))

    def forward(self, x):
        return x + self.move(self.layer(x)) * self.gamma


class LastLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1))


ROWS = torch.rand(2, 5, 8)
CHANNELS = torch.rand(2, 8, 4, 4)
LAYER_SCALES = {
    "linear": (Scaled(nn.Linear(8, 8), lambda x: x, 8), ROWS),
    "mlp": (
        Scaled(nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8)), lambda x: x, 8),
        ROWS,
    ),
    "one number": (Scaled(nn.Linear(8, 8), lambda x: x), ROWS),
    "permuted": (
        Scaled(LastLinear(8, 8), lambda x: x.permute(0, 3, 1, 2).contiguous(), 8, 1, 1),
        CHANNELS,
    ),
    "swapped": (Scaled(nn.Linear(8, 8), lambda x: x.transpose(1, 2).transpose(2, 1), 8), ROWS),
    "convolution": (Scaled(nn.Conv2d(8, 8, 1, groups=2), lambda x: x, 8, 1, 1), CHANNELS),
    "grouped": (
        Scaled(nn.ConvTranspose2d(8, 8, 1, groups=2), lambda x: x, 8, 1, 1),
        CHANNELS,
    ),
    "norm": (
        Scaled(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), lambda x: x, 8, 1, 1),
        CHANNELS,
    ),
    "function": (
        Scaled(
            net_of(
                lambda self, x: F.linear(x, self.fc.weight * 0.5, self.fc.bias),
                fc=nn.Linear(8, 8),
            ),
            lambda x: x,
            8,
        ),
        ROWS,
    ),
}


@pytest.mark.parametrize("case", every(3, LAYER_SCALES))
def test_a_layer_scale_is_folded_into_the_layer_before_it(case, tmp_path):
    model, batch = LAYER_SCALES[case]
    model.eval()
    plan, converted = quantized(model, batch)
    assert not any(site.op == "mul" for site in plan)
    assert any(member.endswith(":mul") for site in plan for member in site.members)
    assert {site.verdict for site in plan if "permute" not in site.op} <= {
        "quantized",
        "passthrough",
    }
    assert output_sqnr_db(model(batch), converted(batch)) > 30
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(batch), converted(batch))


MOVED = {
    "flatten": lambda y, norm: norm(y.flatten(0, 1)).reshape_as(y),
    "rows": lambda y, norm: norm(y.reshape(-1, 8)).view(y.shape),
    "channels first": lambda y, norm: norm(y.transpose(1, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("case", MOVED)
def test_a_batch_norm_over_the_features_of_points_is_folded_however_they_are_moved(case, tmp_path):
    torch.manual_seed(0)
    layers = {"fc": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8)}
    model = net_of(lambda self, x: MOVED[case](self.fc(x), self.norm), **layers)
    model = warmed(model, ROWS)
    plan, converted = quantized(model, ROWS)
    assert plan["fc"].members == ("fc", "norm")
    assert output_sqnr_db(model(ROWS), converted(ROWS)) > 30
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(ROWS), converted(ROWS))
    assert "norm" in sites(quantized(model, ROWS, "qat")[0])


@pytest.mark.parametrize("move", [lambda y: y.flatten(1), lambda y: y.reshape(2, -1)])
def test_a_batch_norm_over_joined_features_is_left_apart(move):
    layers = {"fc": nn.Linear(8, 8), "norm": nn.BatchNorm1d(40)}
    model = net_of(lambda self, x: self.norm(move(self.fc(x))), **layers)
    assert quantized(model, ROWS)[0]["norm"].verdict == "float"


def test_arithmetic_with_parameters_that_learn_is_left_alone_in_training():
    model = net_of(lambda self, x: self.conv(x) * self.scale, conv=nn.Conv2d(3, 8, 1))
    model.scale = nn.Parameter(torch.ones(8, 1, 1))
    plan, _ = quantized(model, phase="qat")
    assert list(sites(plan)) == ["conv", ":mul"]


class KeptFrozen(nn.Sequential):
    """Its ``train`` leaves the BatchNorm in eval mode, as in fine-tuning."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def kept_by_the_caller(norm):
    model = norm_net(norm).train()
    model[1].eval()
    return model


FIXED = {
    "by the caller": lambda: kept_by_the_caller(nn.BatchNorm2d(8)),
    "by the caller, activation inside": lambda: kept_by_the_caller(NormAct(8)),
    "by train": lambda: KeptFrozen(*norm_net(nn.BatchNorm2d(8))).eval(),
    "by its call": lambda: norm_net(
        Function(8, lambda self, x: F.batch_norm(x, self.mean, self.var, self.scale))
    ).eval(),
    "as arithmetic": lambda: norm_net(Frozen(8)).eval(),
    "after a linear layer": lambda: KeptFrozen(nn.Linear(3, 8), nn.BatchNorm1d(8)).eval(),
    "not fused": lambda: KeptFrozen(nn.Hardswish(), nn.BatchNorm2d(3)).eval(),
}


@pytest.mark.parametrize("case", every(3, FIXED))
def test_statistics_that_are_fixed_in_training_are_fused_and_stay_fixed(case, tmp_path):
    torch.manual_seed(0)
    model = FIXED[case]()
    batch = torch.rand(6, 3) if case == "after a linear layer" else BATCH
    compiled = qrecipe.compile(model, recipe(head='phase = "qat"'), batch)
    assert {site.verdict for site in compiled.plan} == {"quantized"}
    prepared = compiled.prepare()
    before = {name: t.clone() for name, t in prepared.named_buffers() if "running" in name}
    assert before
    train(prepared.train(), [batch + 1] * 2, rate=1e-3)
    after = dict(prepared.named_buffers())
    assert all(torch.equal(after[name], before[name]) for name in before)
    converted = compiled.convert(prepared)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model.eval())
    assert torch.equal(loaded(batch), converted(batch))


UNFOLDED = {
    "another shape": lambda self, x: self.conv(x) + self.table,
    "read twice": lambda self, x: (y := self.conv(x)) * self.scale + y,
    "divided by it": lambda self, x: self.scale / self.conv(x),
    "without a batch": lambda self, x: self.conv(x.squeeze(0)) * self.scale,
}


@pytest.mark.parametrize("case", UNFOLDED)
def test_other_arithmetic_stays_what_it_is(case):
    model = net_of(UNFOLDED[case], conv=nn.Conv2d(3, 8, 1))
    model.scale = nn.Parameter(torch.rand(8, 1, 1) + 1)
    model.table = nn.Parameter(torch.rand(8, 8, 8))
    plan = qrecipe.plan(model, recipe(), BATCH[:1])
    assert plan["conv"].members == ("conv",)
