"""Operations that torch's FX graph mode gets wrong or leaves out: docs/traps.md."""

from __future__ import annotations

import copy
import operator

import plain_torch as plain
import pytest
import torch
import torch.nn.functional as F
from plain_torch import INT8, everything, mapping, observed, silence
from plans import named, net_of, recipe, sites, verdicts
from runs import STATIC, silent
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import ConflictError, QRecipeWarning

ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(model, a_recipe, x, count=10):
    return qrecipe.quantize(model, a_recipe, [x] * count, progress=silent)


def gated(factor=1.0):
    """A linear layer, a product with a number and a sigmoid."""
    torch.manual_seed(0)
    return net_of(
        lambda self, x: self.out(self.gate(self.fc(x) * factor)),
        fc=nn.Linear(8, 8),
        gate=nn.Sigmoid(),
        out=nn.Linear(8, 4),
    )


def test_torch_leaves_a_sigmoid_float_under_a_plain_qconfig_and_here_it_gets_its_own_observer():
    with pytest.warns(UserWarning, match="fixed qparams"):
        assert "gate" not in observed(gated(), everything(), ROWS)
    eight_bits = recipe("[tensor.activation]\nreduce_range = false")
    gate = sites(qrecipe.plan(gated(), eight_bits, ROWS))["gate"]
    assert gate.verdict == "quantized"
    assert gate.qconfig.activation.observer.name == "fixed_qparams"
    assert gate.qconfig.activation.observer.arguments == {"scale": 1 / 256, "zero_point": 0}
    ours = quantized(gated(), STATIC, ROWS)
    assert sqnr_db(gated()(ROWS), ours(ROWS)) > 25


def test_torch_clips_what_a_sigmoid_reads_from_a_float_producer_and_here_it_stays_float():
    model = gated(4.0)
    default = get_default_qconfig_mapping("x86")
    excluded = default.set_module_name("fc", None).set_object_type(operator.mul, None)
    theirs = plain.converted(model, excluded, ROWS)
    assert sqnr_db(model(ROWS), theirs(ROWS)) < 20
    ours = named(fc="float")
    gate = sites(qrecipe.plan(model, ours, ROWS))["gate"]
    assert (gate.verdict, "fixed" in gate.reason) == ("float", True)
    assert sqnr_db(model(ROWS), quantized(model, ours, ROWS)(ROWS)) > 30


def joined(factor=100.0):
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: torch.cat([self.small(x), self.large(x)], 1),
        small=nn.Linear(8, 8),
        large=nn.Linear(8, 8),
    )
    with torch.no_grad():
        model.large.weight.mul_(factor)
        model.large.bias.mul_(factor)
    return model


def test_torchs_moving_average_swings_between_the_branches_of_a_cat_and_here_that_is_warned_about():
    model = joined()
    theirs = plain.converted(model, everything(), ROWS)(ROWS)
    assert sqnr_db(model(ROWS)[:, 8:], theirs[:, 8:]) < 5
    prepared = qrecipe.compile(model, STATIC, ROWS).prepare()
    with pytest.warns(QRecipeWarning, match="QR206 the branches of :cat"):
        qrecipe.calibrate(prepared, [ROWS] * 10, progress=silent)


def test_the_minmax_that_the_warning_about_a_cat_proposes_keeps_the_large_branch():
    model = joined()
    minmax = recipe('[tensor.activation]\nobserver = "minmax"\n[lint]\nignore = ["QR206"]')
    ours = quantized(model, minmax, ROWS)(ROWS)
    assert sqnr_db(model(ROWS)[:, 8:], ours[:, 8:]) > 25


class Twice(nn.Module):
    """One module called twice, the second time on values a hundred times as large."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.fc(x) * 100)


def test_torch_keeps_one_scale_for_two_calls_of_a_module_and_here_each_call_has_its_own():
    torch.manual_seed(0)
    model = Twice().eval()
    with silence():
        theirs = plain.converted(model, everything(), ROWS)
    assert sqnr_db(model(ROWS), theirs(ROWS)) < 15
    compiled = qrecipe.compile(model, recipe(), ROWS)
    assert {"fc", "fc#1"} <= set(sites(compiled.plan))
    graph = compiled.graph_module
    first, second = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    assert graph.get_submodule(first).weight is graph.get_submodule(second).weight
    ours = quantized(model, STATIC, ROWS)
    assert ours.get_submodule(first).scale != ours.get_submodule(second).scale
    assert sqnr_db(model(ROWS), ours(ROWS)) > 25


UNSUPPORTED = {
    "GELU": lambda self, x: self.gelu(x),
    "sub": lambda self, x: x - x,
    "bmm": lambda self, x: torch.bmm(x, x),
    "scaled_dot_product_attention": lambda self, x: F.scaled_dot_product_attention(x, x, x),
    "softmax": lambda self, x: F.softmax(x, -1),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_torch_is_silent_about_what_it_has_no_kernel_for_and_the_plan_says_why(name):
    model = net_of(
        lambda self, x: UNSUPPORTED[name](self, self.fc(x)),
        fc=nn.Linear(8, 8),
        gelu=nn.GELU(),
    )
    cube = torch.zeros(4, 8, 8)
    with silence():
        assert observed(model, everything(), cube) == {"fc"}
    plan = qrecipe.plan(model, recipe(), cube)
    first, site = plan.sites
    assert (first.verdict, site.op, site.verdict) == ("quantized", name, "float")
    assert site.reason == f"x86 has no quantized kernel for {name}"
    assert site.reason in str(plan)


HOLDERS = {
    "attention": (nn.MultiheadAttention(8, 2), lambda self, x: self.inner(x, x, x)[0]),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 8), lambda self, x: self.inner(x)),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_torch_is_silent_about_layers_that_hold_layers_and_here_they_are_opened(name):
    inner, forward = HOLDERS[name]
    model = net_of(forward, inner=inner)
    cube = torch.zeros(4, 8, 8)
    with silence():
        assert observed(model, everything(), cube) == set()
    plan = qrecipe.plan(model, recipe(), cube)
    linear = {site.name for site in plan.sites if site.op.startswith("Linear")}
    assert linear == {name for name, module in model.named_modules() if "linear" in name} | {
        f"{path}.{each}_proj"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for each in ("q", "k", "v", "out")
    }
    assert all(site.verdict == "quantized" for site in plan.sites if site.name in linear)


def test_torch_leaves_the_matmul_operator_float_and_here_it_runs_as_torch_matmul():
    model = net_of(lambda self, x: self.a(x) @ self.b(x).t(), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    with silence():
        assert "matmul" not in observed(model, everything(), ROWS)
    text = recipe('[tensor.activation]\nobserver = "minmax"')
    model = net_of(lambda self, x: self.a(x) @ self.b(x).transpose(0, 1), a=model.a, b=model.b)
    assert sites(qrecipe.plan(model, text, ROWS))[":matmul"].verdict == "quantized"
    assert sqnr_db(model(ROWS), quantized(model, text, ROWS)(ROWS)) > 25


def test_torch_is_silent_about_the_boundaries_of_a_chopped_chain_and_the_plan_counts_them():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).eval()
    chopped = {"1": "float", "3": "float"}
    rules = mapping(INT8)
    for name in chopped:
        rules.set_module_name(name, None)
    with silence():
        theirs = [plain.converted(model, each, ROWS) for each in (mapping(INT8), rules)]
    counts = [boundaries(each) for each in theirs]
    assert counts[0] < counts[1]
    lines = "".join(f'"{name}" = "float"\n' for name in chopped)
    a_recipe = recipe(f"[rules.module_name]\n{lines}")
    plan = qrecipe.plan(model, a_recipe, ROWS)
    assert plan.boundaries == counts[1]
    assert f"{counts[1]} q/dq boundaries" in str(plan)
    assert boundaries(quantized(model, a_recipe, ROWS)) == counts[1]


def boundaries(converted):
    targets = [node.target for node in converted.graph.nodes]
    return targets.count(torch.quantize_per_tensor) + targets.count("dequantize")


EXCLUDED = [nn.Hardswish(), nn.MaxPool2d(2), nn.LeakyReLU(0.2)]


def forked(act, consumers):
    torch.manual_seed(0)
    convs = {name: nn.Conv2d(3, 3, 1) for name in ("a", "b", "c")}

    def forward(self, x):
        y = self.act(self.a(x))
        return self.b(y) + self.c(y) if consumers == 2 else self.c(y)

    return net_of(forward, act=copy.deepcopy(act), **convs)


@pytest.mark.parametrize("act", EXCLUDED, ids=lambda module: type(module).__name__)
def test_torch_quantizes_what_a_rule_excludes_between_int8_neighbours_and_here_it_stays_float(act):
    model = forked(act, 1)
    theirs = plain.converted(model, mapping(INT8).set_module_name("act", None), IMAGE)
    assert boundaries(theirs) == 2
    ours = quantized(model, named(act="float"), IMAGE)
    assert plain.called(ours)["act"] is type(act)
    assert boundaries(ours) == 4
    assert sqnr_db(model(IMAGE), ours(IMAGE)) > 25


@pytest.mark.parametrize("act", EXCLUDED, ids=lambda module: type(module).__name__)
def test_an_excluded_operation_with_a_float_consumer_crashes_in_torch_and_runs_here(act):
    model = forked(act, 2)
    rules = mapping(INT8).set_module_name("act", None).set_module_name("b", None)
    theirs = plain.converted(model, rules, IMAGE)
    with pytest.raises((RuntimeError, NotImplementedError)):
        theirs(IMAGE)
    ours = quantized(model, named(act="float", b="float"), IMAGE)
    assert sqnr_db(model(IMAGE), ours(IMAGE)) > 25


class SharedTwoTails(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.conv(self.relu(self.conv(x)))


def test_fusing_changes_a_shared_module_in_torch_and_here_every_call_fuses_alone():
    torch.manual_seed(0)
    model = SharedTwoTails().eval()
    with silence():
        theirs = plain.prepared(model, mapping(), IMAGE)
    assert (theirs(IMAGE) - model(IMAGE)).abs().max() > 0.1
    compiled = qrecipe.compile(model, recipe(), IMAGE)
    torch.testing.assert_close(compiled.graph_module(IMAGE), model(IMAGE))
    assert [site.op for site in compiled.plan.sites] == ["Conv2d+ReLU", "Conv2d"]
    assert sqnr_db(model(IMAGE), quantized(model, STATIC, IMAGE)(IMAGE)) > 25


def test_torch_gives_two_readers_of_a_float_tensor_the_first_ones_range_and_here_they_conflict():
    narrow = plain.activation(MinMaxObserver, quant_min=0, quant_max=127)
    wide = plain.activation(MinMaxObserver, quant_min=0, quant_max=255)
    model = net_of(lambda self, x: self.a(x) + self.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    rules = mapping()
    rules.set_module_name("a", INT8._replace(activation=narrow))
    rules.set_module_name("b", INT8._replace(activation=wide))
    with silence():
        theirs = plain.prepared(model, rules, ROWS)
    (read,) = {node.args[0] for node in theirs.graph.nodes if node.target in ("a", "b")}
    assert theirs.get_submodule(read.target).quant_max == 127
    text = (
        '[tensor.wide]\nobserver = "minmax"\ndtype = "uint8"\nqscheme = "per_tensor_affine"\n'
        '[qconfig.wide]\nweight = "weight"\nactivation = "wide"\n'
        '[rules.module_name]\nb = "wide"'
    )
    with pytest.raises(ConflictError, match="different activation specs"):
        qrecipe.plan(model, recipe(text), ROWS)
    behind = net_of(lambda self, x: self.b(self.a(x)), a=model.a, b=model.b)
    plan = qrecipe.plan(behind, recipe(text), ROWS)
    assert verdicts(plan) == {"a": "quantized", "b": "quantized"}
    assert sites(plan)["a"].input == sites(plan)["a"].qconfig.activation
    assert sites(plan)["b"].input is None


def test_a_depthwise_convolution_that_crawls_on_fbgemm_runs_on_onednn():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(128, 128, 3, groups=128)).eval(), torch.randn(1, 128, 24, 24)
    (site,) = qrecipe.plan(model, recipe(), x).sites
    assert (site.verdict, site.engine) == ("quantized", "onednn")
    assert sqnr_db(model(x), quantized(model, STATIC, x)(x)) > 25
    affine = recipe('[tensor.weight]\nqscheme = "per_channel_affine"')
    codes = {finding.code for finding in qrecipe.plan(model, affine, x).warnings}
    assert "QR207" in codes


def test_an_int8_convolution_gives_channels_last_and_a_float_one_does_not():
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.second(self.first(x)),
        first=nn.Conv2d(3, 8, 3),
        second=nn.Conv2d(8, 8, 3),
    )
    batches = [torch.randn(2, 3, 8, 8) for _ in range(10)]
    float_first = recipe('[rules.module_name]\n"first" = "float"')
    converted = qrecipe.quantize(model.eval(), float_first, batches, progress=silent)
    seen = {}
    for name in ("first", "second"):
        converted.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    converted(batches[0])
    layouts = {
        name: output.is_contiguous(memory_format=torch.channels_last)
        for name, output in seen.items()
    }
    assert layouts == {"first": False, "second": True}
