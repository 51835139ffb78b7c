"""Legal, planned, and still worth a word: boundaries, slow kernels, joined branches."""

from __future__ import annotations

import pytest
import torch
from plans import net_of
from runs import silent
from torch import nn

import qrecipe
from qrecipe.errors.findings import QRecipeWarning

STATIC = "builtin:x86-static"


def codes(plan):
    return [finding.code for finding in plan.warnings]


def wide(*extra):
    return nn.Sequential(nn.Conv2d(32, 64, 3), *extra).eval()


def q_and_dq(converted):
    kinds = [node.target for node in converted.graph.nodes]
    return kinds.count(torch.quantize_per_tensor) + kinds.count("dequantize")


@pytest.mark.parametrize(
    ("floats", "expected"), [((), 2), (("1",), 4), (("0",), 2), (("0", "1", "2"), 0)]
)
def test_the_boundaries_that_the_plan_counts_are_those_of_the_converted_model(floats, expected):
    rules = "".join(f'"{name}" = "float"\n' for name in floats)
    text = f'format = 1\nextends = "{STATIC}"\n[rules.module_name]\n{rules}'
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    batches = [torch.randn(4, 6) for _ in range(12)]
    recipe = qrecipe.parse_recipe(text)
    plan = qrecipe.plan(model, recipe, batches[0])
    assert plan.boundaries == expected
    assert f"{expected} q/dq boundaries" in str(plan)
    assert q_and_dq(qrecipe.quantize(model, recipe, batches, progress=silent)) == expected


def test_a_float_site_between_two_quantized_ones_costs_two_boundaries():
    model = net_of(
        lambda self, x: self.b(torch.nn.functional.gelu(self.a(x))),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
    )
    assert qrecipe.plan(model, STATIC, torch.randn(4, 6)).boundaries == 4


AFFINE = '[tensor.weight]\nqscheme = "per_channel_affine"'


def test_quantize_warns_of_slow_kernels_with_the_site_and_the_command_that_mends_it():
    torch.manual_seed(0)
    slow = nn.ConvTranspose2d(32, 32, 3, 2, 1, 1, groups=32)
    model = nn.Sequential(nn.Conv2d(32, 32, 1), slow).eval()
    batches = [torch.randn(2, 32, 6, 6) for _ in range(10)]
    with pytest.warns(QRecipeWarning, match=r"QR207 .* slower .*: 1\n(.|\n)*qrecipe fastest"):
        qrecipe.quantize(model, "builtin:x86-static-minmax", batches, progress=silent)


@pytest.mark.parametrize(
    ("model", "recipe", "x"),
    [
        (
            nn.ConvTranspose2d(64, 64, 3, 2, 1, 1, groups=64),
            "builtin:x86-static",
            torch.rand(2, 64, 8, 8),
        ),
        (
            nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))),
            "builtin:x86-dynamic",
            torch.rand(2, 64),
        ),
        (
            nn.Sequential(
                nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)
            ),
            "builtin:x86-static",
            torch.rand(2, 64),
        ),
    ],
)
def test_slow_kernels_of_torch_are_no_matter_where_others_run(model, recipe, x):
    model = nn.Sequential(model).eval()
    assert "QR207" in codes(qrecipe.plan(model, recipe, x))
    assert "QR207" not in codes(qrecipe.plan(model, recipe, x, executor="pt2e"))


def test_a_tiny_program_is_measured_where_it_will_run():
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    plan = qrecipe.plan(model, STATIC, torch.rand(2, 6), executor="pt2e")
    (warning,) = plan.warnings
    assert (warning.code, warning.hint) == ("QR208", "measure it where it will run")


@pytest.mark.parametrize(
    ("padding", "backend", "weights", "expected"),
    [
        (0, "fbgemm", AFFINE, ["QR207"]),
        (0, "x86", AFFINE, ["QR207"]),
        (1, "fbgemm", AFFINE, []),
        (0, "fbgemm", "", []),
        (0, "x86", "", []),
        (0, "qnnpack", "", []),
    ],
)
def test_a_depthwise_convolution_without_a_fast_kernel_is_warned_about(
    padding, backend, weights, expected
):
    model = wide(nn.Conv2d(64, 64, 3, padding=padding, groups=64))
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "{STATIC}"\nbackend = "{backend}"\n{weights}'
    )
    assert codes(qrecipe.plan(model, recipe, torch.randn(1, 32, 8, 8))) == expected


def test_symmetric_weights_take_the_slow_depthwise_convolution_to_onednn():
    model = wide(nn.Conv2d(64, 64, 3, groups=64))
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{STATIC}"\nbackend = "fbgemm"')
    site = qrecipe.plan(model, recipe, torch.randn(1, 32, 8, 8)).sites[1]
    assert site.engine == "onednn"
    assert "fast" in site.reason


def test_the_weights_of_dynamic_layers_count_too_for_how_small_a_model_is():
    def forward(self, x):
        return self.lstm(self.conv(x).transpose(1, 2))[0]

    conv, x = nn.Conv1d(4, 8, 3), torch.rand(2, 4, 10)
    large = net_of(forward, conv=conv, lstm=nn.LSTM(8, 64, batch_first=True))
    assert codes(qrecipe.plan(large, "builtin:cnn-lstm", x)) == []
    small = net_of(forward, conv=conv, lstm=nn.LSTM(8, 2, batch_first=True))
    (warning,) = qrecipe.plan(small, "builtin:cnn-lstm", x).warnings
    assert (warning.code, "only have 176 weights" in warning.message) == ("QR208", True)


def test_a_tiny_model_is_told_to_measure_and_lint_can_silence_it():
    model, x = nn.Sequential(nn.Linear(6, 6)).eval(), torch.randn(4, 6)
    assert codes(qrecipe.plan(model, STATIC, x)) == ["QR208"]
    assert codes(qrecipe.plan(wide(), STATIC, torch.randn(1, 32, 8, 8))) == []
    text = f'format = 1\nextends = "{STATIC}"\n[lint]\nignore = ["QR208"]'
    assert codes(qrecipe.plan(model, qrecipe.parse_recipe(text), x)) == []


def joined(factor):
    net = net_of(
        lambda self, x: self.last(torch.cat([self.a(x), self.b(x)], 1)),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
        last=nn.Linear(12, 4),
    )
    with torch.no_grad():
        net.b.weight.copy_(net.a.weight * factor)
        net.b.bias.copy_(net.a.bias * factor)
    return net


def test_branches_of_very_different_range_are_warned_about_after_calibration():
    batches = [torch.randn(8, 6) for _ in range(12)]
    prepared = qrecipe.compile(joined(100.0), STATIC, batches[0]).prepare()
    with pytest.warns(QRecipeWarning, match=r"QR206 the branches of :cat"):
        qrecipe.calibrate(prepared, batches, progress=silent)


def test_branches_of_like_range_are_not_warned_about_and_observers_see_each_batch_once():
    batches = [torch.randn(8, 6) for _ in range(12)]
    compiled = qrecipe.compile(joined(2.0), STATIC, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    again = compiled.prepare()
    with torch.no_grad():
        for batch in batches:
            again(batch)
    for one, two in zip(prepared.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("layer", "with_vnni"),
    [
        (nn.Conv2d(32, 96, 3, padding=1, groups=32), True),
        (nn.Conv2d(104, 312, 3, groups=104), True),
        (nn.Conv2d(32, 96, 7, padding=3, groups=32), False),
        (nn.Conv1d(32, 96, 3, groups=32), True),
        (nn.Conv3d(32, 32, 3, padding=2, dilation=2, groups=32), True),
        (nn.Conv3d(32, 32, 3, groups=32), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("known_as", ["avx512_vnni", "avx2"])
def test_depthwise_convolutions_are_warned_about_on_the_cpus_that_they_are_slow_on(
    monkeypatch, known_as, layer, with_vnni
):
    monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda: known_as)
    x = torch.randn(1, layer.in_channels, *[8] * len(layer.kernel_size))
    warnings = codes(qrecipe.plan(nn.Sequential(layer).eval(), STATIC, x))
    assert ("QR207" in warnings) is (with_vnni or known_as == "avx2")
