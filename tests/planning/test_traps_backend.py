"""Dtypes, ranges and kernels that torch's FX graph mode takes unchecked: docs/traps.md."""

from __future__ import annotations

import plain_torch as plain
import pytest
import torch
import torch.nn.functional as F
from plain_torch import everything, mapping, observed, silence
from plans import net_of, sites
from runs import HEAD, STATIC, silent
from torch import nn
from torch.ao.quantization import QConfig
from torch.ao.quantization.backend_config import (
    get_executorch_backend_config,
    get_fbgemm_backend_config,
    get_native_backend_config,
    get_qnnpack_backend_config,
    get_tensorrt_backend_config,
)
from torch.ao.quantization.backend_config.x86 import get_x86_backend_config
from torch.ao.quantization.observer import (
    MinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PlanError, RecipeError, UnsupportedError
from qrecipe.execution.fx import convert as execution

ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def linear(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *more).eval()


def with_activation(keys):
    return qrecipe.parse_recipe(f"{HEAD}[tensor.activation]\nreduce_range = false\n{keys}\n")


def with_weight(keys):
    return qrecipe.parse_recipe(f"{HEAD}[tensor.weight]\n{keys}\n")


FLOAT16 = PlaceholderObserver.with_args(dtype=torch.float16)
ACTIVATIONS = {
    "int8": (plain.activation(dtype=torch.qint8), 'dtype = "int8"'),
    "int32": (plain.activation(dtype=torch.qint32), 'dtype = "int32"'),
    "int16": (plain.activation(dtype=torch.int16, quant_min=-9, quant_max=9), 'dtype = "int16"'),
    "float8": (plain.activation(dtype=torch.float8_e4m3fn), 'dtype = "float8_e4m3fn"'),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_torch_leaves_a_dtype_without_a_kernel_float_and_here_it_is_an_error(name):
    observer, keys = ACTIVATIONS[name]
    with silence():
        assert observed(linear(), everything(activation=observer), ROWS) == set()
    with pytest.raises((UnsupportedError, RecipeError)):
        qrecipe.plan(linear(), with_activation(keys), ROWS)


def test_torch_leaves_static_float16_and_weight_only_linear_float_and_here_they_are_errors():
    of_weight = PlaceholderObserver.with_args(dtype=torch.float32)
    for activation, weight in ((FLOAT16, FLOAT16), (of_weight, plain.weight())):
        rules = mapping(QConfig(activation=activation, weight=weight))
        with silence():
            assert plain.quantized(plain.converted(linear(), rules, ROWS)) == set()
    half = f'{HEAD}[tensor.half]\ndtype = "float16"\n[qconfig.half]\nweight = "half"\n'
    for rules in (
        f'{half}activation = "half"\n[rules]\nglobal = "half"',
        f'{HEAD}[qconfig.only]\nweight = "weight"\n[rules]\nglobal = "only"',
    ):
        with pytest.raises((UnsupportedError, RecipeError)):
            qrecipe.plan(linear(), qrecipe.parse_recipe(rules), ROWS)


PER_TENSOR = 'observer = "minmax"\nqscheme = "per_tensor_affine"\n'
WEIGHTS = {
    "uint8": (MinMaxObserver.with_args(dtype=torch.quint8), f'{PER_TENSOR}dtype = "uint8"'),
    "uint4": (
        PerChannelMinMaxObserver.with_args(
            dtype=torch.quint4x2, qscheme=torch.per_channel_affine_float_qparams
        ),
        'dtype = "uint4"\nqscheme = "per_channel_affine_float_qparams"',
    ),
    "none": (NoopObserver, None),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_torch_leaves_a_float_module_between_q_and_dq_for_odd_weights_and_here_it_is_an_error(name):
    observer, keys = WEIGHTS[name]
    with silence():
        theirs = plain.converted(linear(), everything(weight=observer), ROWS)
    assert plain.called(theirs) == {"0": nn.Linear}
    assert torch.quantize_per_tensor in plain.functions(theirs)
    ours = (
        with_weight(keys)
        if keys
        else qrecipe.parse_recipe(
            f'{HEAD}[qconfig.only]\nactivation = "activation"\n[rules]\nglobal = "only"'
        )
    )
    with pytest.raises(UnsupportedError):
        qrecipe.plan(linear(), ours, ROWS)


@pytest.mark.parametrize(
    "config", [get_qnnpack_backend_config, get_executorch_backend_config], ids=lambda f: f.__name__
)
def test_torch_warns_about_a_small_eps_and_quantizes_nothing(config):
    """Here it is an error: see test_signed_activations_need_the_eps_that_the_kernels_divide_by."""
    rules = everything(activation=plain.activation(dtype=torch.qint8))
    with pytest.warns(UserWarning, match=r"eps .* must be greater than or equal to"):
        assert observed(linear(), rules, ROWS, backend_config=config()) == set()


@pytest.mark.parametrize("name", ["qnnpack", "executorch"])
def test_torch_checks_the_range_of_weights_in_functions_only_and_here_of_modules_too(name):
    config = {"qnnpack": get_qnnpack_backend_config, "executorch": get_executorch_backend_config}
    signed = plain.activation(dtype=torch.qint8, eps=2**-12)
    rules = everything(activation=signed, weight=plain.per_tensor_weight(eps=2**-12))
    model = net_of(lambda self, x: F.linear(self.fc(x), self.weight), fc=nn.Linear(8, 8))
    model.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.warns(UserWarning, match="weight quantization range must fall within"):
        assert observed(model, rules, ROWS, backend_config=config[name]()) == {"fc"}
    keys = (
        f'eps = {2**-12}\n[tensor.activation]\ndtype = "int8"\nreduce_range = false\neps = {2**-12}'
    )
    ours = qrecipe.parse_recipe(f'{HEAD}backend = "{name}"\n[tensor.weight]\n{keys}')
    with pytest.raises(UnsupportedError, match=r"in -127\.\.127"):
        qrecipe.plan(linear(), ours, ROWS)


def test_a_model_that_torch_converts_for_executorch_does_not_run():
    """Here it is the reference model, which does: see tests/execution/test_export.py."""
    rules = mapping(
        QConfig(
            activation=plain.activation(dtype=torch.qint8, eps=2**-12),
            weight=plain.weight(quant_min=-127, quant_max=127, eps=2**-12),
        )
    )
    with silence():
        theirs = plain.converted(
            linear(), rules, ROWS, backend_config=get_executorch_backend_config()
        )
    with pytest.raises(RuntimeError, match=r"(?i)quint8"):
        theirs(ROWS)


def test_torch_quantizes_nothing_of_an_unsigned_recipe_on_tensorrt():
    """Here it is an error: see test_unsigned_activations_are_refused_where_the_backend_takes..."""
    with silence():
        found = observed(linear(), everything(), ROWS, backend_config=get_tensorrt_backend_config())
    assert found == set()


def test_torch_takes_per_channel_activations_and_never_lowers_them_and_here_they_are_an_error():
    per_channel = PerChannelMinMaxObserver.with_args(
        dtype=torch.quint8, qscheme=torch.per_channel_affine, ch_axis=1
    )
    with silence():
        theirs = plain.converted(linear(), everything(activation=per_channel), ROWS)
    assert "quantized.reference" in plain.called(theirs)["0"].__module__
    with pytest.raises(RecipeError, match="per channel"):
        with_activation('observer = "per_channel_minmax"\nqscheme = "per_channel_affine"')


def test_torchs_x86_config_lacks_layer_norm_and_ours_is_recorded_and_has_it():
    patterns = [
        {config.pattern for config in get().configs}
        for get in (get_x86_backend_config, get_fbgemm_backend_config, get_native_backend_config)
    ]
    assert [nn.LayerNorm in found for found in patterns] == [False, False, True]
    model = linear(nn.LayerNorm(8))
    for backend in ("x86", "fbgemm"):
        ours = qrecipe.parse_recipe(f'{HEAD}backend = "{backend}"')
        compiled = qrecipe.compile(model, ours, ROWS)
        assert sites(compiled.plan)["1"].verdict == "quantized"
        assert compiled.plan.backend == backend
        assert nn.LayerNorm in {config.pattern for config in compiled.backend_config.configs}


def test_torch_converts_to_float_for_another_backend_and_here_one_object_serves_both(monkeypatch):
    observing = plain.calibrated(linear(), everything(), ROWS)
    with silence():
        theirs = plain.convert_fx(observing, backend_config=get_tensorrt_backend_config())
    assert plain.quantized(theirs) == set()
    assert torch.quantize_per_tensor in plain.functions(theirs)
    used = []

    def noting(function):
        def call(*args, **kwargs):
            config = kwargs.get("backend_config", args[-1] if args else None)
            used.append(config)
            return function(*args, **kwargs)

        return call

    for name in ("prepare", "convert"):
        monkeypatch.setattr(execution, name, noting(getattr(execution, name)))
    compiled = qrecipe.compile(linear(), STATIC, ROWS)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, [ROWS] * 10, progress=silent)
    compiled.convert(prepared)
    assert len(used) == 2
    assert used[0] is used[1]
    ours, theirs = (each.configs for each in (used[0], compiled.backend_config))
    assert [(each.pattern, each.dtype_configs) for each in ours] == [
        (each.pattern, each.dtype_configs) for each in theirs
    ]


def test_torch_takes_a_range_that_the_dtype_lacks_and_here_it_is_an_error():
    wide = plain.activation(MinMaxObserver, quant_min=0, quant_max=300)
    model = linear()
    with silence():
        theirs = plain.converted(model, everything(activation=wide), ROWS)
    assert plain.quantized(theirs) == {"0"}
    seven_bits = plain.activation(MinMaxObserver, quant_min=0, quant_max=127)
    known = plain.converted(model, everything(activation=seven_bits), ROWS)
    right = sqnr_db(model(ROWS), known(ROWS))
    assert sqnr_db(model(ROWS), theirs(ROWS)) < right - 10
    with pytest.raises(RecipeError, match="300"):
        with_activation("quant_min = 0\nquant_max = 300")


def test_torch_takes_a_channel_axis_that_the_operation_lacks_and_here_it_is_the_operations_own():
    model = linear()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 8).unsqueeze(1))
    with silence():
        theirs = plain.converted(model, everything(weight=plain.weight(ch_axis=1)), ROWS)
    right = sqnr_db(model(ROWS), plain.converted(model, everything(), ROWS)(ROWS))
    assert sqnr_db(model(ROWS), theirs(ROWS)) < right - 10
    with pytest.raises(RecipeError, match="channel axis comes from the operation"):
        with_weight('observer = { name = "per_channel_minmax", ch_axis = 1 }')
    ours = qrecipe.quantize(model, STATIC, [ROWS] * 10, progress=silent)
    assert ours.get_submodule("0").weight().q_per_channel_axis() == 0
    assert sqnr_db(model(ROWS), ours(ROWS)) > 25


class Convolution(nn.Module):
    """A convolution as a function, its other arguments as given."""

    def __init__(self, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.options = options

    def forward(self, x):
        return F.conv2d(x, self.weight, **self.options)


@pytest.mark.parametrize("options", [{}, {"stride": 1, "padding": 0}], ids=["omitted", "numbers"])
def test_torch_cannot_convert_f_conv_with_arguments_left_out_and_here_they_are_spelled_out(options):
    model, x = Convolution(**options).eval(), torch.randn(4, 3, 8, 8)
    with pytest.raises((RuntimeError, TypeError), match="conv2d_prepack"):
        plain.converted(model, everything(), x)(x)
    ours = qrecipe.quantize(model, STATIC, [x] * 10, progress=silent)
    assert sqnr_db(model(x), ours(x)) > 25


def test_torch_fails_on_half_precision_at_conversion_only_and_here_the_plan_refuses_it():
    half = linear().half()
    with pytest.raises(RuntimeError, match="expects a Float Tensor"):
        plain.converted(half, everything(), ROWS.half())
    with pytest.raises(PlanError, match="float16"):
        qrecipe.plan(half, STATIC, ROWS.half())
