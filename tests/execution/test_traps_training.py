"""What FX graph mode does in quantization-aware training, and what qrecipe does instead."""

from __future__ import annotations

import warnings

import pytest
import torch
from plans import net_of
from torch import nn
from torch.ao.nn.intrinsic.qat import ConvBnReLU2d
from torch.ao.quantization import (
    FakeQuantize,
    FakeQuantizeBase,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig,
)
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from training import qat_recipe, train, trained

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PluginError, SchemaError

EIGHT = get_default_qat_qconfig("x86")
FOUR = QConfig(
    activation=EIGHT.activation,
    weight=FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
)
_RANDOM = torch.Generator().manual_seed(0)
IMAGES = [torch.randn(2, 3, 8, 8, generator=_RANDOM) for _ in range(3)]


@pytest.fixture(autouse=True)
def _without_notices():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def conv_bn_relu():
    return net_of(
        lambda self, x: self.relu(self.bn(self.conv(x))),
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
    )


def two_linears():
    return net_of(lambda self, x: self.d(self.c(x)), c=nn.Linear(8, 8), d=nn.Linear(8, 8))


ROWS = [torch.randn(4, 8, generator=_RANDOM) for _ in range(3)]
FOUR_BITS = """
[tensor.four]
observer = "moving_average_minmax"
dtype = "int4"
qscheme = "per_tensor_symmetric"
[rules.module_name]
"co*" = { weight = "four", activation = "activation" }
"""


def test_torch_ignores_a_regex_where_it_swaps_modules_for_training_and_here_a_glob_reaches_them():
    """Row 10."""
    mapping = QConfigMapping().set_module_name_regex("conv", EIGHT)
    prepared = prepare_qat_fx(conv_bn_relu().train(), mapping, (IMAGES[0],))
    assert not isinstance(prepared.conv, ConvBnReLU2d)
    ours = qrecipe.compile(conv_bn_relu(), qat_recipe(rules=FOUR_BITS), IMAGES[0]).prepare()
    assert isinstance(ours.conv, ConvBnReLU2d)
    assert ours.conv.weight_fake_quant.quant_max == 7


def test_torch_keeps_the_first_recipes_weights_on_a_second_prepare_and_here_each_gets_its_own():
    """Row 11."""
    model = two_linears().train()
    prepare_qat_fx(model, QConfigMapping().set_global(EIGHT), (ROWS[0],))
    second = prepare_qat_fx(model, QConfigMapping().set_global(FOUR), (ROWS[0],))
    assert second.c.weight_fake_quant.quant_max == 127
    four = qat_recipe(rules=FOUR_BITS.replace('"co*"', '"{c,d}"'))
    ours = qrecipe.compile(model, four, ROWS[0]).prepare()
    assert ours.c.weight_fake_quant.quant_max == 7
    plain = two_linears().eval()
    qrecipe.compile(plain, qat_recipe(), ROWS[0]).prepare()
    assert not any(hasattr(module, "qconfig") for module in plain.modules())


def test_torch_trains_one_range_for_two_calls_of_a_module_and_here_each_call_has_its_own():
    """Row 31."""

    def twice():
        return net_of(
            lambda self, x: self.a(100 * torch.relu(self.a(x))), a=nn.Linear(8, 8, bias=False)
        )

    theirs = prepare_qat_fx(twice().train(), QConfigMapping().set_global(EIGHT), (ROWS[0],))
    linears = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 1
    torch.manual_seed(0)
    compiled, prepared = trained(twice(), ROWS, qat_recipe())
    ours = [m for m in prepared.modules() if isinstance(m, nn.Linear)]
    assert len(ours) == 2
    assert ours[0].weight is ours[1].weight
    assert len([s for s in compiled.plan.sites if s.op.startswith("Linear")]) == 2


def test_torch_leaves_the_consumer_of_a_standalone_module_unlowered_and_here_there_are_none():
    """Row 40."""
    custom = PrepareCustomConfig().set_standalone_module_name(
        "c", QConfigMapping().set_global(EIGHT), (ROWS[0],), None, None
    )
    inner = nn.Sequential(nn.Linear(8, 8))
    model = net_of(lambda self, x: self.d(self.c(x)), c=inner, d=nn.Linear(8, 8))
    plain = QConfig(
        activation=MovingAverageMinMaxObserver.with_args(dtype=torch.quint8),
        weight=MovingAverageMinMaxObserver.with_args(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
        ),
    )
    mapping = QConfigMapping().set_global(plain)
    prepared = prepare_fx(model, mapping, (ROWS[0],), prepare_custom_config=custom)
    prepared(ROWS[0])
    converted = convert_fx(prepared)
    kinds = {type(m).__module__ for m in converted.modules()}
    assert any(".quantized.reference." in kind for kind in kinds) or isinstance(
        converted.d, nn.Linear
    )
    compiled = qrecipe.compile(model, qat_recipe(), ROWS[0])
    assert not compiled.prepare_custom_config.standalone_module_names
    assert not compiled.prepare_custom_config.standalone_module_classes


def test_torch_prepares_for_training_a_model_in_eval_mode_and_here_the_copy_is_in_training_mode():
    """Row 42."""
    theirs = prepare_qat_fx(two_linears().eval(), QConfigMapping().set_global(EIGHT), (ROWS[0],))
    assert not theirs.training
    ours = qrecipe.compile(two_linears().eval(), qat_recipe(), ROWS[0]).prepare()
    assert ours.training


def test_torch_takes_observers_in_training_and_fake_quants_without_and_here_the_phase_decides():
    """Row 42."""
    observers = QConfig(
        activation=MovingAverageMinMaxObserver.with_args(dtype=torch.quint8),
        weight=MovingAverageMinMaxObserver.with_args(dtype=torch.qint8),
    )
    mapping = QConfigMapping().set_global(observers)
    theirs = prepare_qat_fx(two_linears().train(), mapping, (ROWS[0],))
    assert not any(isinstance(m, FakeQuantizeBase) for m in theirs.modules())
    trains = qat_recipe()
    calibrates = qrecipe.parse_recipe(trains.to_toml().replace('phase = "qat"', 'phase = "ptq"'))
    ours = {
        phase: [
            m
            for m in qrecipe.compile(two_linears(), recipe, ROWS[0]).prepare().modules()
            if isinstance(m, (FakeQuantizeBase, ObserverBase))
        ]
        for phase, recipe in (("qat", trains), ("ptq", calibrates))
    }
    assert any(isinstance(m, FakeQuantizeBase) for m in ours["qat"])
    assert not any(isinstance(m, FakeQuantizeBase) for m in ours["ptq"])


def test_torch_spoils_a_trained_model_by_converting_and_here_it_goes_on_training():
    """Row 43."""
    theirs = prepare_qat_fx(two_linears().train(), QConfigMapping().set_global(EIGHT), (ROWS[0],))
    theirs(ROWS[0])
    convert_fx(theirs)
    assert not any(hasattr(m, "weight_fake_quant") for m in theirs.modules())
    compiled, ours = trained(two_linears(), ROWS, qat_recipe())
    compiled.convert(ours)
    assert train(ours, ROWS)


def test_torch_moves_the_callers_statistics_and_weights_in_training_and_here_they_stay():
    """Row 44."""
    model = conv_bn_relu().train()
    theirs = prepare_qat_fx(model, QConfigMapping().set_global(EIGHT), (IMAGES[0],))
    before = model.bn.running_mean.clone()
    theirs(IMAGES[0])
    assert not torch.equal(model.bn.running_mean, before)
    model = conv_bn_relu()
    weight, mean = model.conv.weight.clone(), model.bn.running_mean.clone()
    trained(model, IMAGES, qat_recipe())
    assert torch.equal(model.conv.weight, weight)
    assert torch.equal(model.bn.running_mean, mean)


class _NoObserver(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.dtype, self.qscheme = torch.quint8, torch.per_tensor_affine

    def forward(self, x):
        return x

    def calculate_qparams(self):
        return torch.tensor([0.1]), torch.tensor([0])


class _NoPostProcess(FakeQuantizeBase):
    def __init__(self, observer=None, **kwargs):
        super().__init__()
        self.dtype, self.qscheme = torch.quint8, torch.per_tensor_affine

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255)

    def calculate_qparams(self):
        return torch.tensor([0.1]), torch.tensor([0])


def test_a_custom_observer_that_is_none_fails_deep_in_torch_and_here_at_its_registration():
    """Row 50."""
    mapping = QConfigMapping().set_global(QConfig(activation=_NoObserver, weight=_NoObserver))
    with pytest.raises(AssertionError, match="must be an activation post process"):
        prepare_fx(two_linears(), mapping, (ROWS[0],))
    with pytest.raises(PluginError, match="is not a subclass of ObserverBase"):
        qrecipe.register_observer("none_at_all")(_NoObserver)


def test_a_fake_quant_without_an_observer_fails_in_conversion_and_here_at_its_registration():
    """Row 51."""
    mapping = QConfigMapping().set_global(QConfig(activation=_NoPostProcess, weight=FOUR.weight))
    with pytest.raises(AttributeError, match="activation_post_process"):
        prepare_qat_fx(two_linears().train(), mapping, (ROWS[0],))
    with pytest.raises(PluginError, match="activation_post_process"):
        qrecipe.register_fake_quant("no_post_process")(_NoPostProcess)


def test_torchs_learnable_scales_fit_layers_of_one_width_only_and_here_each_has_its_own():
    """Row 52."""
    model = net_of(lambda self, x: self.d(self.c(x)), c=nn.Linear(8, 8), d=nn.Linear(8, 4))
    learnable = _LearnableFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        channel_len=8,
    )
    mapping = QConfigMapping().set_global(QConfig(activation=EIGHT.activation, weight=learnable))
    theirs = prepare_qat_fx(model.train(), mapping, (ROWS[0],))
    with pytest.raises(RuntimeError):
        theirs(ROWS[0])
    _, ours = trained(model.eval(), ROWS, qat_recipe("learnable"))
    assert ours.d.weight_fake_quant.scale.shape == (4,)


def test_torchs_fused_fake_quant_takes_moving_averages_only_and_here_the_recipe_says_so():
    """Row 53."""
    with pytest.raises(AssertionError):
        FusedMovingAvgObsFakeQuantize(observer=HistogramObserver, quant_min=0, quant_max=255)
    text = qat_recipe("fused_moving_average").to_toml()
    wrong = text.replace('observer = "moving_average_minmax"', 'observer = "histogram"')
    with pytest.raises(SchemaError, match='cannot wrap the observer "histogram"'):
        qrecipe.parse_recipe(wrong)


def test_torchs_fused_fake_quant_trains_another_scale_than_it_converts():
    """Row 53: 0.4 % for symmetric weights, which FakeQuantize does not show."""
    x = torch.linspace(-1, 1, 64).reshape(8, 8)
    scales = {}
    for kind in (FakeQuantize, FusedMovingAvgObsFakeQuantize):
        fake_quant = kind(
            observer=MovingAverageMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        )
        fake_quant(x)
        scales[kind] = float(fake_quant.scale / fake_quant.calculate_qparams()[0])
    assert scales[FakeQuantize] == 1
    assert abs(scales[FusedMovingAvgObsFakeQuantize] - 1) == pytest.approx(0.004, abs=0.001)


def test_torchs_eval_mode_lets_observers_run_on_and_here_they_rest():
    """Row 54."""
    theirs = prepare_qat_fx(two_linears().train(), QConfigMapping().set_global(EIGHT), (ROWS[0],))
    _, ours = trained(two_linears(), ROWS, qat_recipe())
    for model, moves in ((theirs, True), (ours, False)):
        model(ROWS[0])
        model.eval()
        scale = model.activation_post_process_0.scale.clone()
        model(ROWS[0] * 50)
        assert (not torch.equal(model.activation_post_process_0.scale, scale)) is moves


def test_switching_fake_quants_off_does_not_switch_conversion_off():
    """Row 54: nor here, where conversion freezes ranges and switches them on in its own copy."""
    compiled, ours = trained(two_linears(), ROWS, qat_recipe())
    expected = compiled.convert(ours)(ROWS[0])
    for module in ours.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
    assert torch.equal(compiled.convert(ours)(ROWS[0]), expected)
    assert sqnr_db(expected, ours(ROWS[0])) < 80


def test_torch_trains_the_inside_of_a_nested_module_that_is_not_traced_and_here_it_stays_float():
    """Row 67."""

    def nested():
        inner = net_of(lambda self, x: self.fc(x) if x.sum() > -1e9 else x, fc=nn.Linear(8, 8))
        block = net_of(lambda self, x: self.dec(self.enc(x)), enc=nn.Linear(8, 8), dec=inner)
        return net_of(lambda self, x: self.blk(x), blk=block)

    custom = PrepareCustomConfig().set_non_traceable_module_names(["blk.dec"])
    mapping = QConfigMapping().set_global(EIGHT)
    theirs = prepare_qat_fx(nested().train(), mapping, (ROWS[0],), prepare_custom_config=custom)
    theirs(ROWS[0])
    left = [m for m in convert_fx(theirs).modules() if isinstance(m, FakeQuantizeBase)]
    assert left
    kept_out = '[fx]\nnon_traceable_module_name = ["blk.dec"]\n'
    compiled, prepared = trained(nested(), ROWS, qat_recipe(rules=kept_out))
    converted = compiled.convert(prepared)
    assert not [m for m in converted.modules() if isinstance(m, FakeQuantizeBase)]
    assert type(converted.get_submodule("blk.dec.fc")) is nn.Linear
