"""Rules on modules whose own calls are fused into groups that begin outside them (QR238)."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from corpus import missing, torchvision
from hostile import RECIPES
from plans import named, net_of, plan_of, recipe, sites, verdicts
from recipe_files import install
from torch import nn

import qrecipe
from qrecipe.errors.findings import QRecipeWarning

IMAGE = torch.zeros(2, 3, 8, 8)

pytestmark = pytest.mark.filterwarnings("ignore:.*QR238")


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the forward of a BatchNorm is spelled out, and acts."""

    def __init__(self, act):
        super().__init__(8)
        self.act = act

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(y)


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: a product and a sum with constants."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.rand(8) + 0.5)
        self.register_buffer("bias", torch.rand(8))

    def forward(self, x):
        return x * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


class Relu(nn.Module):
    def forward(self, x):
        return F.relu(x)


class Convolution(nn.Module):
    """Computes with a function, so that its group is named after a call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


def conv(inputs=3):
    return nn.Conv2d(inputs, 8, 3)


def net(first, layer):
    return net_of(lambda self, x: self.layer(self.first(x)), first=first, layer=layer)


LAYERS = {
    "norm and activation": (conv, lambda: NormAct(nn.ReLU()), "first"),
    "norm and another site": (conv, lambda: NormAct(nn.Hardswish()), "first"),
    "frozen norm": (conv, FrozenNorm, "first"),
    "function": (conv, Relu, "first"),
    "function after a function": (Convolution, Relu, "first:conv2d"),
    "block": (conv, lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8)), "first"),
}
EVERY_LAYER = pytest.mark.parametrize(
    ("first", "layer", "group"), LAYERS.values(), ids=LAYERS.keys()
)


def norm_net():
    return net(conv(), NormAct(nn.ReLU()))


def fused_away(plan, code="QR238"):
    return [finding for finding in plan.warnings if finding.code == code]


def rules(*lines, tier="module_name"):
    return recipe(f"[rules.{tier}]\n" + "\n".join(lines))


# --- what it says


def test_a_rule_on_a_layer_that_is_fused_with_the_one_before_is_a_warning():
    (finding,) = fused_away(qrecipe.plan(norm_net(), named(layer="float"), IMAGE))
    assert str(finding) == (
        '<recipe>:5:1: QR238 module_name "layer" says float about layer:batch_norm, layer.act, '
        "members of the fused group first, decided by global = int8\n"
        '    5 | "layer" = "float"\n'
        "      | ^^^^^^^ a group is decided as one, by its first operation: "
        'write the rule for "first"'
    )


@EVERY_LAYER
@pytest.mark.parametrize("head", ["", 'executor = "pt2e"', 'phase = "qat"'])
def test_the_rule_that_it_proposes_leaves_the_group_float(first, layer, group, head):
    model = net(first(), layer())
    shadowed = recipe('[rules.module_name]\n"layer" = "float"\n', head=head)
    plan = qrecipe.plan(model, shadowed, IMAGE)
    assert verdicts(plan)[group] == "quantized"
    (finding,) = fused_away(plan)
    assert f"the fused group {group}, " in finding.message
    assert not fused_away(plan, "QR217")
    (proposed,) = re.findall(r'write the rule for (".*")', finding.hint)
    both = recipe(f'[rules.module_name]\n"layer" = "float"\n{proposed} = "float"\n', head=head)
    mended = qrecipe.plan(model, both, IMAGE)
    assert set(verdicts(mended).values()) == {"float"}
    assert not fused_away(mended)


@EVERY_LAYER
def test_explain_names_the_group_that_a_layers_calls_are_fused_into(first, layer, group):
    plan = qrecipe.plan(net(first(), layer()), recipe(), IMAGE)
    members = [member for member in sites(plan)[group].members if member.startswith("layer")]
    text = plan.explain("layer")
    are = "is a member" if len(members) == 1 else "are members"
    assert f"{', '.join(members)} {are} of a fused group, decided as {group}" in text
    assert "fused group" not in plan.explain("")


def test_explain_counts_the_sites_that_a_module_names():
    assert (
        qrecipe.plan(norm_net(), recipe(), IMAGE)
        .explain("layer")
        .startswith("layer has no own site\n")
    )
    first, layer, _ = LAYERS["norm and another site"]
    plan = qrecipe.plan(net(first(), layer()), recipe(), IMAGE)
    assert plan.explain("layer").startswith("layer has 1 site\n")


def test_it_is_said_to_those_who_only_quantize_and_ignore_silences_it():
    batches = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    quiet = '[lint]\nignore = ["QR201", "QR234"]\n'
    with pytest.warns(QRecipeWarning, match='QR238 module_name "layer"'):
        qrecipe.quantize(norm_net(), rules('"layer" = "float"', quiet), batches)
    silent = rules('"layer" = "float"', '[lint]\nignore = ["QR238"]')
    assert not fused_away(qrecipe.plan(norm_net(), silent, IMAGE))


# --- which rules


@pytest.mark.parametrize(
    ("tier", "key"),
    [
        ("module_name", "l*er"),
        ("module_type", f"{__name__}.NormAct"),
        ("module_type", "torch.nn.ReLU"),
        ("function", "torch.nn.functional.batch_norm"),
    ],
)
def test_globs_types_and_functions_are_told_too(tier, key):
    plan = qrecipe.plan(norm_net(), rules(f'"{key}" = "float"', tier=tier), IMAGE)
    (finding,) = fused_away(plan)
    assert finding.message.startswith(f'{tier} "{key}" says float about layer')
    assert not fused_away(plan, "QR217")


def test_a_type_that_decides_some_of_its_modules_is_told_of_the_others():
    model = net_of(
        lambda self, x: self.alone(torch.sigmoid(self.fused(self.first(x)))),
        first=conv(),
        fused=nn.ReLU(),
        alone=nn.ReLU(),
    )
    plan = qrecipe.plan(model, rules('"torch.nn.ReLU" = "float"', tier="module_type"), IMAGE)
    assert verdicts(plan)["alone"] == "float"
    (finding,) = fused_away(plan)
    assert "about fused, a member of the fused group first, " in finding.message


@pytest.mark.parametrize("key", ["stage?", "stage*", "*", "*.layer"])
def test_a_glob_over_many_groups_is_one_warning_at_most(key):
    stages = {f"stage{at}": net(Convolution(), NormAct(nn.ReLU())) for at in range(6)}
    for at in range(1, 6):
        stages[f"stage{at}"].first.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        for name in stages:
            x = getattr(self, name)(x)
        return x

    plan = qrecipe.plan(net_of(forward, **stages), rules(f'"{key}" = "float"'), IMAGE)
    found = fused_away(plan)
    assert len(found) == (1 if key == "*.layer" else 0)  # the others cover whole groups
    for finding in found:
        assert "and 8 more, members of the fused groups stage0.first:conv2d" in finding.message
        assert finding.hint.endswith('"stage3.first:conv2d" and 2 more')


def test_a_rule_around_the_whole_group_is_not_told_whatever_decides_its_first_member():
    model = net_of(lambda self, x: self.stage(x), stage=norm_net())
    for other in ({}, {"stage__first": "int8"}):
        assert not fused_away(qrecipe.plan(model, named(stage="float", **other), IMAGE))


def test_a_rule_that_says_what_the_group_does_is_not_told():
    first, layer, _ = LAYERS["block"]
    block = net(first(), layer())
    for said in (
        {"layer": "int8"},
        {"layer": "float", "first": "float"},
        # nearer rules than that of the block: they are heard, and without them it would be told
        {"layer": "float", "layer__0": "int8", "layer__1": "int8"},
    ):
        plan = qrecipe.plan(block, named(**said), IMAGE)
        assert not fused_away(plan)
        assert not fused_away(plan, "QR217")


def test_a_rule_by_type_that_a_rule_by_name_on_the_group_beats_is_not_told():
    text = '[rules.module_name]\n"first" = "int8"\n[rules.module_type]\n"torch.nn.ReLU" = "float"\n'
    plan = qrecipe.plan(norm_net(), recipe(text), IMAGE)
    assert not fused_away(plan)
    assert fused_away(plan, "QR217")


def test_a_group_that_is_float_for_want_of_a_kernel_is_as_a_float_rule_says():
    dynamic = '[rules.module_name]\n"layer" = "float"\n'
    plan = qrecipe.plan(norm_net(), recipe(dynamic, base="builtin:x86-dynamic"), IMAGE)
    assert verdicts(plan) == {"first": "float"}
    assert not fused_away(plan)


def test_a_dynamic_layer_that_swallows_an_activation_is_told():
    model = net_of(lambda self, x: self.layer(self.first(x)), first=nn.Linear(6, 4), layer=Relu())
    dynamic = '[rules.module_name]\n"layer" = "float"\n'
    plan = qrecipe.plan(model, recipe(dynamic, base="builtin:x86-dynamic"), torch.zeros(2, 6))
    assert verdicts(plan) == {"first": "quantized"}
    assert "the fused group first" in fused_away(plan)[0].message


def test_a_dynamic_head_whose_activation_a_static_backbone_swallows_is_not_told():
    # an activation alone has no dynamic kernel, so nothing is lost
    def forward(self, x):
        return self.head[1](self.head[0](self.first(x)).mean((2, 3)))

    model = net_of(forward, first=conv(), head=nn.Sequential(Relu(), nn.Linear(8, 4)))
    text = """
[tensor.dynamic]
dtype = "uint8"
is_dynamic = true
[qconfig.dynamic]
weight = "weight"
activation = "dynamic"
[rules.module_name]
"head" = "dynamic"
"""
    plan = qrecipe.plan(model, recipe(text), IMAGE)
    assert sites(plan)["head.1"].mode == "dynamic"
    assert not fused_away(plan)


# --- whose rules


def test_rules_of_ones_own_bases_are_told_unless_the_recipe_decides_the_group(tmp_path):
    base, top = tmp_path / "base.toml", tmp_path / "top.toml"
    head = 'format = 1\nextends = "{}"\n[rules.module_name]\n'
    base.write_text(head.format("builtin:x86-static") + '"layer" = "float"\n')
    top.write_text(head.format("./base.toml"))
    (finding,) = fused_away(qrecipe.plan(norm_net(), top, IMAGE))
    assert finding.location.file.endswith("base.toml")
    top.write_text(head.format("./base.toml") + '"first" = "int8"\n')
    assert not fused_away(qrecipe.plan(norm_net(), top, IMAGE))


def test_a_published_recipe_names_types_for_many_models_and_is_not_told(tmp_path, monkeypatch):
    text = 'format = 1\nextends = "{}"\n[rules.module_type]\n'
    package = install(tmp_path / "site", monkeypatch, "acme.vision")
    base = text.format("builtin:x86-static") + '"torch.nn.ReLU" = "float"\n'
    (package / "base.toml").write_text(base)
    (package / "cnn.toml").write_text(text.format("./base.toml") + '"torch.nn.GELU" = "float"\n')
    plan = qrecipe.plan(norm_net(), "acme-recipes:cnn", IMAGE)
    assert "torch.nn.ReLU" in [verdict.rule.key for verdict in plan.rules if verdict.sites]
    assert not fused_away(plan)


def test_no_shipped_recipe_is_told_even_by_its_path():
    for path in sorted(RECIPES.glob("*.toml")):
        assert not fused_away(plan_of("residual", path))


# --- as other libraries write them


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_norms_of_timm_and_torchvision_are_told():
    frozen = torchvision("ops").FrozenBatchNorm2d
    norm_act = pytest.importorskip("timm").layers.BatchNormAct2d
    for layer in (frozen(8), norm_act(8), norm_act(8, act_layer=nn.Hardswish)):
        plan = qrecipe.plan(net(conv(), layer), named(layer="float"), IMAGE)
        assert verdicts(plan)["first"] == "quantized"
        (finding,) = fused_away(plan)
        assert 'write the rule for "first"' in finding.hint
        mended = qrecipe.plan(net(conv(), layer), named(layer="float", first="float"), IMAGE)
        assert set(verdicts(mended).values()) == {"float"}
