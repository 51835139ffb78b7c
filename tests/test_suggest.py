"""Suggested recipes: they plan without a finding, and say why they are as they are."""

from __future__ import annotations

import json
import warnings

import pytest
import tomli
import torch
from corpus import CORPUS, TORCHVISION, missing
from differential import forget_models, snapshot
from nets import NETS, UNTRACEABLE
from plans import net_of, sites
from runs import silent
from test_cli import folder, run
from test_roots import Routed
from torch import nn

import qrecipe
from qrecipe.authoring.suggest import suggestion
from qrecipe.authoring.suggest_work import work_of
from qrecipe.errors import QRecipeWarning, TraceError, UnsupportedError
from qrecipe.inputs import Inputs

assert folder  # the fixture

STATIC = {
    *("residual", "depthwise", "shared_conv", "shared_conv_two_norms", "functional", "shapes"),
    *("squeeze_excite", "decoder", "norms"),
}
DYNAMIC_TORCHVISION = {"convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16"}
ALWAYS = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")

BY_SIZE = {"QR208"}
"""What no recipe can help: the toy nets are so small that int8 may be slower."""


def scheme_of(name):
    if name in TORCHVISION:
        return {"alexnet": "mixed"}.get(
            name, "dynamic" if name in DYNAMIC_TORCHVISION else "static"
        )
    return "mixed" if name == "cnn_lstm" else "static" if name in STATIC else "dynamic"


def _corpus():
    for name in CORPUS:
        marks = []
        if name in TORCHVISION:
            marks.append(pytest.mark.skipif(missing() is not None, reason=str(missing())))
            marks += [] if name in ALWAYS else [pytest.mark.slow]
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(_corpus()))
def test_the_suggestion_plans_without_a_finding_on_the_corpus(name):
    forget_models()
    net = CORPUS[name]
    model, batch = net.model(), net.batches(1)[0]
    recipe = qrecipe.suggest(model, batch)
    plan = qrecipe.plan(model, recipe, batch)
    assert plan.findings == ()
    assert {finding.code for finding in plan.warnings} <= BY_SIZE
    assert recipe.name == f"suggested-{scheme_of(name)}"
    modes = {site.mode for site in plan.sites if site.verdict == "quantized"}
    expected = {"static": {"static"}, "dynamic": {"dynamic"}, "mixed": {"static", "dynamic"}}
    assert modes - {"weight_only"} == expected[scheme_of(name)]


def test_weights_and_activations_are_observed_as_the_literature_recommends():
    net = NETS["residual"]
    plan = qrecipe.plan(
        net.model(), qrecipe.suggest(net.model(), net.batches(1)[0]), net.batches(1)[0]
    )
    specs = [site.qconfig for site in plan.sites if site.verdict == "quantized"]
    weights = {spec.weight for spec in specs if spec.weight is not None}
    assert {(w.observer.name, w.dtype, w.qscheme) for w in weights} == {
        ("per_channel_minmax", "int8", "per_channel_symmetric")
    }
    assert {spec.activation.observer.name for spec in specs} == {"moving_average_minmax"}


@pytest.mark.parametrize("name", ["residual", "cnn_lstm", "tagger"])
def test_a_suggested_recipe_quantizes(name):
    net = NETS[name]
    recipe = qrecipe.suggest(net.model(), net.batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(net.model(), recipe, net.batches(10), progress=silent)
    assert qrecipe.provenance(converted).fingerprint == recipe.fingerprint


def test_an_embedding_is_quantized_by_its_weights_alone():
    net = NETS["tagger"]
    model, batch = net.model(), net.batches(1)[0]
    found = sites(qrecipe.plan(model, qrecipe.suggest(model, batch), batch))
    assert found["embedding"].mode == "weight_only"
    assert found["fc"].mode == "dynamic"


def test_layers_that_a_type_rule_could_not_have_are_float_by_name_with_the_reason():
    model = net_of(
        lambda self, x: self.fc(self.good(self.bad(x)[0])[0]),
        bad=nn.LSTM(6, 8, proj_size=6),
        good=nn.LSTM(6, 6),
        fc=nn.Linear(6, 4),
    )
    batch = torch.randn(5, 2, 6)
    plan = qrecipe.plan(model, qrecipe.suggest(model, batch), batch)
    found = sites(plan)
    assert found["bad"].verdict == "float"
    assert found["bad"].rule.key == "bad"
    assert "proj_size" in found["bad"].rule.reason
    assert found["good"].mode == found["fc"].mode == "dynamic"


def test_one_rule_leaves_a_whole_type_without_a_kernel_float():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
    ).eval()
    text = suggestion(model, torch.randn(2, 3, 8, 8))
    assert tomli.loads(text)["rules"] == {
        "module_type": {
            "torch.nn.GroupNorm": {
                "qconfig": "float",
                "reason": "x86 has no quantized kernel for GroupNorm",
            }
        }
    }


def test_a_dynamic_recipe_says_why_convolutions_stay_float():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv1d(4, 4, 1)).eval()
    rules = tomli.loads(suggestion(model, torch.randn(2, 4, 64)))["rules"]
    assert (
        rules["module_type"]["torch.nn.Conv1d"]["reason"] == "x86 has no dynamic kernel for Conv1d"
    )
    assert rules["global"]["qconfig"] == "float"


def test_a_convolution_that_int8_makes_slower_stays_float():
    slow = nn.ConvTranspose2d(128, 128, 3, groups=128)
    model = nn.Sequential(nn.Conv2d(3, 128, 3), slow, nn.Conv2d(128, 8, 3)).eval()
    batch = torch.randn(2, 3, 8, 8)
    assert "QR207" in {w.code for w in qrecipe.plan(model, "builtin:x86-static", batch).warnings}
    plan = qrecipe.plan(model, qrecipe.suggest(model, batch), batch)
    assert plan.warnings == ()
    assert sites(plan)["1"].verdict == "float"
    assert "slower" in sites(plan)["1"].reason


def test_a_convolutional_model_of_which_only_parts_trace_gets_roots():
    torch.manual_seed(0)
    model, batch = Routed().eval(), torch.randn(4, 3, 8, 8)
    recipe = qrecipe.suggest(model, batch)
    assert recipe.fx.roots == ("backbone", "head")
    assert "outside the roots" in recipe.description
    found = sites(qrecipe.plan(model, recipe, batch))
    assert found.keys() >= {"backbone.conv", "head.fc1", "head.fc2"}


def test_an_untraceable_model_of_linear_layers_needs_no_roots():
    model, batch = UNTRACEABLE.model(), UNTRACEABLE.batches(1)[0]
    recipe = qrecipe.suggest(model, batch)
    assert recipe.fx.roots == ()
    assert "swapped one by one" in recipe.description
    plan = qrecipe.plan(model, recipe, batch)
    assert plan.executor == "eager"
    modes = {name: site.mode for name, site in sites(plan).items()}
    assert modes["head"] == modes["attention.qkv"] == "dynamic"


def test_a_convolutional_model_without_a_part_that_traces_is_an_error():
    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y

    with pytest.raises(TraceError, match="QR305"):
        qrecipe.suggest(net_of(forward, conv=nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))


def test_a_model_without_any_kernel_is_an_error():
    with pytest.raises(UnsupportedError, match="QR335"):
        qrecipe.suggest(nn.Sequential(nn.GELU(), nn.SiLU()).eval(), torch.randn(2, 6))


@pytest.mark.parametrize("name", ["residual", "cnn_lstm", "recurrent"])
def test_the_callers_model_stays_as_it_was(name):
    net = NETS[name]
    model = net.model()
    before = snapshot(model)
    qrecipe.suggest(model, net.batches(1)[0])
    assert snapshot(model) == before


def test_the_description_tells_the_size_and_the_rule_of_thumb():
    net = NETS["mlp"]
    recipe = qrecipe.suggest(net.model(), net.batches(1)[0])
    assert "above 10 million parameters are more robust" in recipe.description
    assert "this one has 180." in recipe.description


def test_work_is_what_the_layers_multiply():
    model = net_of(
        lambda self, x: self.fc(self.lstm(self.conv(x))[0]),
        conv=nn.Conv1d(5, 5, 3, padding=1),
        lstm=nn.LSTM(6, 8, batch_first=True),
        fc=nn.Linear(8, 3),
    )
    work = work_of(model, Inputs.from_batch(torch.randn(2, 5, 6)))
    assert work.convolutions == 2 * 6 * 5 * 5 * 3
    assert work.products == 2 * 5 * (4 * 8 * (6 + 8) + 8 * 3)


def test_the_command_prints_a_recipe_that_can_be_planned(folder):
    printed = run("suggest", "--model", "model.py:factory")
    assert printed.exit_code == 0
    (folder / "printed.toml").write_text(printed.stdout)
    assert run("plan", "printed.toml", "--model", "model.py:factory").exit_code == 0
    written = run("suggest", "--model", "model.py:bare", "--input", "2x3x8x8", "--out", "own.toml")
    assert written.exit_code == 0
    assert written.stdout == "written to own.toml\n"
    assert (folder / "own.toml").read_text() == printed.stdout


def test_the_command_gives_the_recipe_as_json(folder):
    document = json.loads(run("suggest", "--model", "model.py:factory", "--json").stdout)
    assert qrecipe.parse_recipe(document["recipe"]).fingerprint == document["fingerprint"]
    assert document["out"] is None


def test_the_command_without_inputs_is_wrong_usage(folder):
    assert run("suggest", "--model", "model.py:bare").exit_code == 2
