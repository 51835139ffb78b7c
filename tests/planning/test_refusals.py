"""What only the audit used to find: kernels that are missing or wrong for some arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import QRecipeWarning, UnsupportedError


def images(count=10):
    return [torch.randn(2, 8, 10, 10) for _ in range(count)]


def between(operation, **modules):
    """A network with the operation between two convolutions."""
    return net_of(
        lambda self, x: self.b(operation(self, self.a(x))),
        a=nn.Conv2d(8, 8, 3, padding=1),
        b=nn.Conv2d(8, 8, 3, padding=1),
        **modules,
    )


def of(module):
    return lambda: between(lambda self, y: self.m(y), m=module())


def calling(function):
    return lambda: between(lambda self, y: function(y))


def computed_bias():
    model = between(lambda self, y: F.conv2d(y, self.b.weight, self.v + y.mean()))
    model.v = nn.Parameter(torch.rand(8))
    return model


X86, ARM = "builtin:x86-static", "builtin:arm-static"
STATISTICS = "statistics"
REFUSED = {
    "softmax_from_the_end": (ARM, of(lambda: nn.Softmax(-1)), "m", "from the front"),
    "average_with_a_divisor": (
        *(ARM, of(lambda: nn.AvgPool2d(2, divisor_override=3)), "m", "size of the window"),
    ),
    "average_without_padding": (
        *(ARM, of(lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False)), "m"),
        "size of the window",
    ),
    "average_as_a_function": (
        *(ARM, calling(lambda y: F.avg_pool2d(y, 2, divisor_override=3)), ":avg_pool2d"),
        "size of the window",
    ),
    "running_instance_norm": (
        *(X86, of(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), "m"),
        STATISTICS,
    ),
    "instance_norm_given_statistics": (
        X86,
        calling(lambda y: F.instance_norm(y, y.new_zeros(8), y.new_ones(8), use_input_stats=False)),
        ":instance_norm",
        STATISTICS,
    ),
    "batch_norm_without_statistics": (
        *(X86, of(lambda: nn.BatchNorm2d(8, track_running_stats=False)), "m", STATISTICS),
    ),
    "computed_bias": (X86, computed_bias, ":conv2d", "bias is computed"),
    "mean_in_another_dtype": (
        X86,
        calling(lambda y: y.mean((2, 3), keepdim=True, dtype=torch.float64).float()),
        *(":mean", "cannot return another dtype"),
    ),
    "antialiasing": (
        X86,
        calling(lambda y: F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=True)),
        *(":interpolate", "antialias"),
    ),
    "tanh_in_place": (X86, calling(lambda y: y.tanh_() * 1), ":tanh", "in place"),
    "sigmoid_in_place": (X86, calling(lambda y: y.sigmoid_() * 1), ":sigmoid", "in place"),
    "joined_with_a_mask": (
        *(
            X86,
            calling(lambda y: torch.cat([y[:, :4], y[:, 4:] > 0], 1)),
            ":cat",
            "not floating-point",
        ),
    ),
    "joined_with_integers": (
        X86,
        calling(lambda y: torch.cat([y[:, :4], (y[:, 4:] > 0).long()], 1)),
        *(":cat", "not floating-point"),
    ),
    "maxima_and_their_places": (
        X86,
        lambda: between(lambda self, y: self.m(y)[0], m=nn.MaxPool2d(2, return_indices=True)),
        *("m", "several results"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_stays_float_with_a_reason_and_the_rest_is_quantized_right(kind):
    base, build, name, reason = REFUSED[kind]
    model, batches = build(), images()
    found = sites(qrecipe.plan(model, base, batches[0]))
    assert found[name].verdict == "float"
    assert reason in found[name].reason
    assert found["a"].verdict == "quantized"
    converted = qrecipe.quantize(model, base, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 20


def test_a_transposed_convolution_in_three_dimensions_is_refused_on_qnnpack_as_a_function_too():
    model = net_of(lambda self, x: F.conv_transpose3d(x, self.w))
    model.w = nn.Parameter(torch.randn(4, 4, 2, 2, 2))
    with pytest.raises(qrecipe.QRecipeError, match="cannot unpack the weights"):
        qrecipe.plan(model, ARM, torch.randn(1, 4, 3, 3, 3))


def test_a_linear_function_with_a_vector_for_weight_stays_float():
    model = net_of(lambda self, x: F.linear(self.fc(x), self.v), fc=nn.Linear(4, 4))
    model.v = nn.Parameter(torch.randn(4))
    found = sites(qrecipe.plan(model, "builtin:x86-static", torch.randn(2, 4)))
    assert found[":linear"].reason == "its weight is a vector"


def test_a_size_that_is_given_as_an_argument_is_not_observed():
    model = net_of(
        lambda self, x, size: self.b(F.interpolate(self.a(x), size=size)),
        a=nn.Conv2d(8, 8, 3),
        b=nn.Conv2d(8, 8, 3),
    )
    batches = [(x, (6, 6)) for x in images()]
    plan = qrecipe.plan(model, X86, batches[0])
    assert 'its argument "size"' in sites(plan)[":interpolate"].reason
    converted = qrecipe.quantize(model, X86, batches, progress=silent)
    assert sqnr_db(model(*batches[0]), converted(*batches[0])) > 20


class Derived(nn.Conv2d):
    pass


WORDS = {
    "function": lambda: between(
        lambda self, y: F.conv2d(y, self.b.weight, self.b.bias, padding="same")
    ),
    "subclass": lambda: nn.Sequential(Derived(8, 8, 3, padding="valid"), nn.Conv2d(8, 8, 3)),
    "lone": lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2),
}


@pytest.mark.parametrize("kind", WORDS)
def test_padding_as_a_word_is_written_in_numbers_wherever_the_convolution_stands(kind):
    model, batches = WORDS[kind]().eval(), images()
    converted = qrecipe.quantize(model, X86, batches, progress=silent)
    assert {site.verdict for site in qrecipe.plan(model, X86, batches[0]).sites} == {"quantized"}
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_as_a_word_that_pads_the_sides_differently_stays_float_as_a_function_too():
    model = between(lambda self, y: F.conv2d(y, self.w, padding="same"))
    model.w = nn.Parameter(torch.randn(8, 8, 2, 2))
    found = sites(qrecipe.plan(model, X86, images(1)[0]))
    assert found[":conv2d"].verdict == "float"
    assert "is asymmetric" in found[":conv2d"].reason


# --- branches


def joined(offset):
    model = net_of(
        lambda self, x: torch.cat([self.a(x), self.b(x)], 1),
        a=nn.Conv2d(8, 8, 1),
        b=nn.Conv2d(8, 8, 1),
    )
    model.b.bias.data += offset
    return model


def test_a_branch_far_from_zero_is_as_wide_as_its_distance():
    accepted = recipe(head='[lint]\nignore = ["QR203"]')
    with pytest.warns(QRecipeWarning, match="^QR206"):
        qrecipe.quantize(joined(100.0), accepted, images(), progress=silent)


# --- slow kernels

SLOW = {
    "one_dimension": (lambda: nn.Conv1d(128, 128, 3, groups=128), (1, 128, 16), "onednn", []),
    "many_outputs": (
        *(
            lambda: nn.Conv2d(128, 512, 3, padding=1, groups=128),
            (1, 128, 6, 6),
            "onednn",
            ["QR207"],
        ),
    ),
    "three_to_a_group": (
        *(lambda: nn.Conv2d(384, 384, 3, padding=1, groups=128), (1, 384, 6, 6), "onednn", []),
    ),
    "transposed": (
        *(lambda: nn.ConvTranspose2d(128, 128, 4, groups=128), (1, 128, 6, 6), "onednn", []),
    ),
    "transposed_to_multiples_of_its_stride": (
        lambda: nn.ConvTranspose2d(128, 128, 4, 2, 1, groups=128),
        *((1, 128, 6, 6), "onednn", ["QR207"]),
    ),
    "transposed_with_output_padding": (
        lambda: nn.ConvTranspose2d(32, 32, 3, 2, 1, 1, groups=32),
        *((1, 32, 6, 6), None, ["QR207"]),
    ),
    "transposed_to_many_outputs": (
        *(lambda: nn.ConvTranspose2d(32, 64, 4, 2, groups=32), (1, 32, 6, 6), None, []),
    ),
    "transposed_to_many_outputs_in_odd_steps": (
        lambda: nn.ConvTranspose2d(32, 64, 3, 2, groups=32),
        *((1, 32, 6, 6), "fbgemm", ["QR207"]),
    ),
    "four_to_a_group": (
        *(lambda: nn.Conv2d(512, 512, 3, padding=1, groups=128), (1, 512, 6, 6), None, []),
    ),
}


@pytest.mark.parametrize("kind", SLOW)
def test_convolutions_in_small_groups_go_where_they_are_fast_or_are_warned_about(monkeypatch, kind):
    monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda: "avx512_vnni")
    build, shape, engine, codes = SLOW[kind]
    accepted = recipe(head='[lint]\nignore = ["QR208"]')
    model, batches = nn.Sequential(build()).eval(), [torch.randn(shape) for _ in range(10)]
    plan = qrecipe.plan(model, accepted, batches[0])
    assert plan.sites[0].engine == engine
    assert [warning.code for warning in plan.warnings] == codes
    converted = qrecipe.quantize(model, accepted, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 20


@pytest.mark.parametrize("name", ["static-minmax", "dynamic"])
def test_onednn_takes_symmetric_weights_only_and_the_plan_says_so(name):
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    text = f'format = 1\nextends = "builtin:x86-{name}"\nbackend = "onednn"\n'
    affine = text + '[tensor.weight]\nqscheme = "per_channel_affine"\n'
    with pytest.raises(UnsupportedError, match=r"QR303 (.|\n)* onednn takes symmetric weights"):
        qrecipe.plan(model, qrecipe.parse_recipe(affine), torch.randn(2, 8))
    assert qrecipe.plan(model, qrecipe.parse_recipe(text), torch.randn(2, 8))["0"].mode


def test_a_mask_of_infinities_is_not_added_in_int8():
    model = net_of(
        lambda self, x: torch.softmax(self.fc(x) + self.mask, -1) @ x, fc=nn.Linear(6, 6)
    )
    model.register_buffer("mask", torch.triu(torch.full((6, 6), -torch.inf), 1))
    batches = [torch.randn(6, 6) for _ in range(12)]
    plan = qrecipe.plan(model, "builtin:x86-static", batches[0])
    assert "infinite" in sites(plan)[":add"].reason
    converted = qrecipe.quantize(model, "builtin:x86-static", batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 20


def test_limits_that_are_tensors_are_not_clamped_to_in_int8():
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.last(torch.clamp(self.first(x), self.low, torch.tensor(1.0))),
        first=nn.Linear(6, 6),
        last=nn.Linear(6, 2),
    )
    model.register_buffer("low", torch.tensor(-1.0))
    batches = [torch.randn(4, 6) for _ in range(12)]
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", batches, progress=silent)
    site = qrecipe.plan(model, "builtin:x86-static-minmax", batches[0])[":clamp"]
    assert site.verdict == "float"
    assert "limits are tensors" in site.reason
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25


def test_functions_that_change_what_a_module_returned_are_fused_and_quantized():
    model = net_of(
        lambda self, x: self.last(F.leaky_relu_(torch.relu_(self.first(x)).clip(0, 1))),
        first=nn.Linear(6, 6),
        last=nn.Linear(6, 2),
    )
    plan = qrecipe.plan(model, "builtin:x86-static-minmax", torch.randn(4, 6))
    assert plan["first"].members == ("first", ":relu")
    assert plan[":clamp"].verdict == "passthrough"


def test_a_change_in_place_through_an_identity_reaches_what_it_returns():
    def forward(self, x):
        y = self.first(x)
        return self.last(F.relu_(self.between(y))) + y.sum()

    torch.manual_seed(0)
    model = net_of(forward, first=nn.Linear(6, 6), between=nn.Identity(), last=nn.Linear(6, 2))
    batches = [torch.randn(4, 6) for _ in range(12)]
    converted = qrecipe.quantize(model, "builtin:x86-static-minmax", batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25
