"""How rules go astray in torch's FX graph mode, and what becomes of them here: docs/traps.md."""

from __future__ import annotations

import operator

import plain_torch as plain
import pytest
import torch
import torch.nn.functional as F
from plain_torch import INT8, mapping, observed, silence
from plans import named, net_of, recipe, rule_verdicts, sites, verdicts
from runs import silent
from torch import nn
from torch.ao.quantization import QConfigMapping, get_default_qconfig_mapping

import qrecipe
from qrecipe.errors.findings import ConflictError, UnmatchedRuleError

ROWS = torch.zeros(2, 6)
IMAGE = torch.zeros(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.add(self.conv2(self.conv1(x)), x)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block())
        self.layer10 = nn.Sequential(Block())

    def forward(self, x):
        return self.layer10(self.layer1(x)) + x


def layers():
    return Layers().eval()


def chain(*modules):
    return nn.Sequential(*modules).eval()


def in_plan(model, a_recipe, x=IMAGE):
    """The sites that a recipe quantizes."""
    return {
        name for name, v in verdicts(qrecipe.plan(model, a_recipe, x)).items() if v == "quantized"
    }


ONLY = '[rules]\nglobal = "float"\n'


def test_a_rule_that_matches_nothing_is_silent_in_torch_and_an_error_here():
    rules = (
        QConfigMapping()
        .set_module_name("layerX", INT8)
        .set_module_name_regex("nope.*", INT8)
        .set_object_type(nn.LSTM, INT8)
        .set_object_type("hello", INT8)
        .set_module_name_object_type_order("layer1.0", nn.Conv2d, 9, INT8)
    )
    with silence():
        assert observed(layers(), rules, IMAGE) == set()
    for key in ('module_name]\n"layer1.0.conv3"', 'module_type]\n"models.Blok"'):
        with pytest.raises(UnmatchedRuleError) as caught:
            qrecipe.plan(layers(), recipe(f'[rules.{key} = "float"'), IMAGE)
        assert caught.value.findings[0].code == "QR301"
    with pytest.raises(UnmatchedRuleError, match=r'"layer1\.0\.conv1"'):
        qrecipe.plan(layers(), named(layer1__0__conv3="float"), IMAGE)


def test_torchs_regexes_are_anchored_at_the_start_only_and_our_names_are_whole():
    with silence():
        by_layer1 = observed(
            layers(), QConfigMapping().set_module_name_regex("layer1", INT8), IMAGE
        )
        by_conv1 = observed(layers(), QConfigMapping().set_module_name_regex("conv1", INT8), IMAGE)
    assert {"layer1_0_conv1", "layer10_0_conv1"} <= by_layer1
    assert by_conv1 == set()
    inside = in_plan(layers(), recipe(f'{ONLY}[rules.module_name]\n"layer1" = "int8"'))
    assert inside == {"layer1.0.conv1", "layer1.0.conv2", "layer1.0:add"}
    everywhere = in_plan(layers(), recipe(f'{ONLY}[rules.module_name]\n"**.conv1" = "int8"'))
    assert everywhere == {"layer1.0.conv1", "layer10.0.conv1"}


def test_in_torch_a_parents_name_beats_a_nearer_regex_and_here_the_nearer_rule_wins():
    rules = (
        QConfigMapping()
        .set_module_name("layer1", None)
        .set_module_name_regex(r"layer1\.0\.conv1", INT8)
    )
    with silence():
        assert observed(layers(), rules, IMAGE) == set()
    text = f'{ONLY}[rules.module_name]\n"layer1" = "float"\n"layer1.*.conv1" = "int8"'
    assert in_plan(layers(), recipe(text)) == {"layer1.0.conv1"}


def test_torchs_rule_for_the_root_misses_the_functions_in_its_forward_and_ours_do_not():
    with silence():
        by_root = observed(layers(), QConfigMapping().set_module_name("", INT8), IMAGE)
    assert "add" not in str(by_root)
    assert ":add" in in_plan(layers(), recipe())
    assert in_plan(layers(), recipe(f'{ONLY}[rules.module_name]\n":add" = "int8"')) == {":add"}


def test_in_torch_a_containers_type_beats_the_functions_own_rule_and_here_the_function_is_nearer():
    rules = QConfigMapping().set_object_type(torch.add, None).set_object_type(Block, INT8)
    with silence():
        assert {"add", "add_1"} & observed(layers(), rules, IMAGE)
    container = f"{Block.__module__}.Block"
    text = (
        f'{ONLY}[rules.module_type]\n"{container}" = "int8"\n'
        '[rules.function]\n"torch.add" = "float"'
    )
    assert in_plan(layers(), recipe(text)) == {
        f"{layer}.0.{conv}" for layer in ("layer1", "layer10") for conv in ("conv1", "conv2")
    }


def test_torch_tells_the_spellings_of_a_function_apart_and_ours_are_one_family():
    model = net_of(lambda self, x: torch.add(self.a(x) + x, x), a=nn.Linear(6, 6))
    with silence():
        by_operator = observed(model, QConfigMapping().set_object_type(operator.add, INT8), ROWS)
        by_torch = observed(model, QConfigMapping().set_object_type(torch.add, INT8), ROWS)
    assert len(by_operator) == len(by_torch) == 1
    assert by_operator != by_torch
    for spelling in ("torch.add", "operator.add"):
        text = f'{ONLY}[rules.function]\n"{spelling}" = "int8"'
        assert in_plan(model, recipe(text), ROWS) == {":add", ":add#1"}


class OwnLinear(nn.Linear):
    """A subclass that computes something of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_rule_for_a_type_does_not_mean_its_subclasses_and_the_plan_says_so():
    base = QConfigMapping().set_object_type(nn.modules.conv._ConvNd, INT8)
    with silence():
        assert observed(layers(), base, IMAGE) == set()
    model = chain(OwnLinear(6, 6))
    plan = qrecipe.plan(model, recipe('[rules.module_type]\n"torch.nn.Linear" = "int8"'), ROWS)
    assert rule_verdicts(plan) == {"": "applied", "torch.nn.Linear": "unused"}
    own = f"{OwnLinear.__module__}.OwnLinear"
    (warning,) = [finding for finding in plan.warnings if finding.code == "QR209"]
    assert own in warning.hint
    by_own_name = recipe(f'[rules.module_type]\n"{own}" = "float"')
    assert in_plan(model, recipe(), ROWS) == {"0:linear"}
    assert in_plan(model, by_own_name, ROWS) == set()


def fused():
    model = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(model).eval()


@pytest.mark.parametrize("member", ["0.1", "0.2"])
def test_torch_ignores_rules_inside_a_fusion_and_here_they_are_a_conflict(member):
    with silence():
        excluded = observed(fused(), mapping(INT8).set_module_name(member, None), IMAGE)
        included = observed(fused(), mapping(None).set_module_name(member, INT8), IMAGE)
    assert excluded
    assert not included
    text = f'[rules.module_name]\n"{member}" = "float"'
    with pytest.raises(ConflictError) as caught:
        qrecipe.plan(fused(), recipe(text), IMAGE)
    assert caught.value.findings[0].code == "QR304"
    assert '"0.0"' in caught.value.findings[0].hint


def test_torch_cannot_quantize_by_type_what_fuses_and_here_the_group_follows_its_first_member():
    with pytest.raises(LookupError, match="same qconfigs"):
        observed(fused(), mapping(None).set_object_type(nn.Conv2d, INT8), IMAGE)
    text = f'{ONLY}[rules.module_type]\n"torch.nn.Conv2d" = "int8"'
    (site,) = qrecipe.plan(fused(), recipe(text), IMAGE).sites
    assert (site.op, site.verdict) == ("Conv2d+BatchNorm2d+ReLU", "quantized")


def test_torch_quantizes_an_excluded_type_that_fuses_and_here_it_stays_float():
    torch.manual_seed(0)
    model = chain(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(8, 6)
    with silence():
        theirs = plain.converted(model, mapping(INT8).set_object_type(nn.Linear, None), x)
    assert plain.quantized(theirs) == {"0"}
    text = '[rules.module_type]\n"torch.nn.Linear" = "float"'
    ours = qrecipe.quantize(model, recipe(text), [x] * 10, progress=silent)
    assert plain.quantized(ours) == set()
    torch.testing.assert_close(ours(x), model(x))


def test_torchs_default_mapping_outlives_a_float_global_and_ours_has_no_types_at_all():
    model = net_of(lambda self, x: F.relu(self.s(self.a(x))), a=nn.Linear(6, 6), s=nn.Sigmoid())
    with silence():
        leftover = observed(model, get_default_qconfig_mapping("x86").set_global(None), ROWS)
    assert "s" in leftover
    compiled = qrecipe.compile(model, recipe(ONLY), ROWS)
    assert {site.verdict for site in compiled.plan.sites} == {"float"}
    assert not compiled.qconfig_mapping.object_type_qconfigs
    assert not any(compiled.qconfig_mapping.module_name_qconfigs.values())
    assert compiled.qconfig_mapping.global_qconfig is None


def test_torch_ignores_a_rule_for_an_alias_and_here_it_decides():
    model = net_of(lambda self, x: self.b(self.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.other = model.b
    with silence():
        assert "b" in observed(model, mapping(INT8).set_module_name("other", None), ROWS)
    plan = qrecipe.plan(model, named(other="float"), ROWS)
    assert verdicts(plan) == {"a": "quantized", "b": "float"}
    assert sites(plan)["b"].rule.key == "other"
