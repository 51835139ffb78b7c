"""The verdicts of a plan: what is quantized, what follows what, and what stays as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, Decoder, Mlp, Residual
from plans import (
    IMAGE,
    INT8_ACTIVATION,
    ROWS,
    named,
    net_of,
    plan_of,
    recipe,
    rule_verdicts,
    sites,
    verdicts,
)
from torch import nn

import qrecipe
from qrecipe.errors.findings import PlanError, UnmatchedRuleError
from qrecipe.recipe.references import builtin_names

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("QRECIPE_UPDATE_GOLDEN") == "1"

# --- golden plans

BUILTIN = {
    "x86-static": ("residual", "decoder"),
    "x86-vnni-static": ("residual", "decoder"),
    "x86-static-histogram": ("residual", "decoder"),
    "x86-static-minmax": ("residual", "decoder"),
    "x86-vnni-static-minmax": ("residual", "decoder"),
    "arm-static": ("residual", "decoder"),
    "arm-static-minmax": ("residual", "decoder"),
    "x86-dynamic": ("attention", "cells"),
    "float16-dynamic": ("attention", "cells"),
    "embedding-weight-only": ("tagger",),
    "linear-weight-only": ("attention",),
    "cnn-lstm": ("cnn_lstm",),
}
"""The nets whose plans show what a shipped recipe is for."""


def test_every_shipped_recipe_has_its_plans():
    assert set(BUILTIN) == set(builtin_names())


@pytest.mark.parametrize("name", BUILTIN)
def test_the_plan_of_a_shipped_recipe_stays_as_it_was(name):
    """QRECIPE_UPDATE_GOLDEN=1 writes the files anew; read the difference before committing it."""
    nets = [NETS[net] for net in BUILTIN[name]]
    plans = [qrecipe.plan(net.model(), f"builtin:{name}", net.batches(1)[0]) for net in nets]
    text = "\n\n".join(map(_unstyled, plans)) + "\n"
    path = GOLDEN / f"{name}.txt"
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BUILTIN)
def test_the_json_of_a_shipped_recipes_plan_stays_as_it_was(name):
    net = NETS["squeeze_excite" if "static" in name else BUILTIN[name][0]]
    plan = qrecipe.plan(net.model(), f"builtin:{name}", net.batches(1)[0])
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        path.write_text(plan.to_json() + "\n", encoding="utf-8")
    assert plan.to_json() + "\n" == path.read_text(encoding="utf-8")


def _unstyled(plan):
    return "\n".join(line.rstrip() for line in str(plan).splitlines())


def test_a_plan_names_a_recipe_file_as_it_was_given_and_no_folder_of_the_machine(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("team").mkdir()
    Path("team/base.toml").write_text('format = 1\nextends = "builtin:x86-static"\n')
    Path("own.toml").write_text(
        'format = 1\nextends = "./team/base.toml"\n[rules]\nglobal = "int8"'
    )
    plan = qrecipe.plan(Mlp().eval(), "own.toml", ROWS)
    text = f"{plan}\n{plan.explain('fc1')}\n{plan.to_json()}"
    assert "own.toml:4:1" in text
    assert str(tmp_path) not in text


def test_equal_plans_give_equal_text_and_json_whatever_the_order_of_keys():
    one = recipe('[rules.module_name]\n"conv?" = "float"\n"[c]onv1" = "float"\n"fc" = "float"')
    two = recipe('[rules.module_name]\n"fc" = "float"\n"[c]onv1" = "float"\n"conv?" = "float"')
    assert one.fingerprint == two.fingerprint

    def decided(a_recipe):
        plan = qrecipe.plan(NETS["residual"].model(), a_recipe, IMAGE)
        found = json.loads(plan.to_json())
        for site in found["sites"]:
            del site["rule"]["location"]
            site["shadowed"] = sorted(rule["key"] for rule in site["shadowed"])
        return found["sites"], str(plan).split("\n\n")[1]

    assert decided(one) == decided(two)


def test_the_json_of_a_plan_says_for_every_site_what_the_plan_says():
    plan = plan_of("squeeze_excite")
    found = json.loads(plan.to_json())
    assert found["fingerprint"] == plan.fingerprint
    assert found["backend"] == "x86"
    assert [site["name"] for site in found["sites"]] == [site.name for site in plan.sites]
    for written, site in zip(found["sites"], plan.sites, strict=True):
        assert written["verdict"] == site.verdict
        assert written["members"] == list(site.members)
        assert (written["qconfig"] is None) == (site.qconfig is None)
    assert plan.to_json() == plan_of("squeeze_excite").to_json()


# --- verdicts


def test_an_observed_site_is_quantized_with_the_very_specs_of_its_rule():
    loaded = recipe()
    plan = plan_of("mlp", loaded)
    (first, second) = plan.sites
    assert first.verdict == second.verdict == "quantized"
    assert first.mode == "static"
    assert first.qconfig == loaded.qconfigs["int8"]
    assert first.qconfig is second.qconfig or first.qconfig == second.qconfig


def test_the_input_spec_is_shown_only_where_a_site_reads_float():
    found = sites(plan_of("mlp"))
    assert found["fc1"].input == found["fc1"].qconfig.activation
    assert found["fc2"].input is None
    after_float = sites(plan_of("mlp", named(fc1="float")))
    assert after_float["fc1"].input is None
    assert after_float["fc2"].input == after_float["fc2"].qconfig.activation


def test_operations_without_a_weight_have_no_weight_spec():
    found = sites(plan_of("residual"))
    assert found["layer1.0:add"].qconfig.weight is None
    assert found["layer1.0:add"].qconfig.activation == found["conv1"].qconfig.activation


def test_copies_and_shapes_follow_their_producer_and_carry_its_activation_spec():
    found = sites(plan_of("residual"))
    for name, producer in (("pool", "conv1"), ("head", "layer1.1:add"), (":flatten", "head")):
        assert found[name].verdict == "passthrough"
        assert producer in found[name].reason
        assert found[name].qconfig.activation == found[producer].qconfig.activation


def test_a_passthrough_follows_a_float_producer_into_float_and_says_whom():
    found = sites(plan_of("residual", named(conv1="float")))
    assert found["pool"].verdict == "float"
    assert "conv1" in found["pool"].reason


@pytest.mark.parametrize(
    "rules",
    [
        '[rules.module_name]\n"pool" = "float"',
        '[rules.module_type]\n"torch.nn.MaxPool2d" = "float"',
    ],
)
def test_a_passthrough_is_stopped_by_its_exact_name_and_its_type(rules):
    found = sites(plan_of("residual", recipe(rules)))
    assert found["pool"].verdict == "float"
    assert found["pool"].rule.is_float


def test_a_passthrough_is_stopped_by_its_function():
    found = sites(plan_of("residual", recipe('[rules.function]\n"torch.flatten" = "float"')))
    assert found[":flatten"].verdict == "float"
    assert found["head"].verdict == "passthrough"


def test_no_glob_container_or_global_rule_stops_a_passthrough():
    def forward(self, x):
        return self.tail(self.body(x))

    model = net_of(forward, body=nn.Conv2d(3, 4, 1), tail=nn.Sequential(nn.MaxPool2d(2)))
    for key in ("tail", "tail.*", "t*"):
        plan = qrecipe.plan(model, recipe(f'[rules.module_name]\n"{key}" = "float"'), IMAGE)
        assert sites(plan)["tail.0"].verdict == "passthrough"
    floating = recipe('[rules]\nglobal = "float"\n[rules.module_name]\n"body" = "int8"')
    assert sites(qrecipe.plan(model, floating, IMAGE))["tail.0"].verdict == "passthrough"


def test_a_passthrough_with_several_producers_follows_only_if_all_are_quantized():
    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)

    model = net_of(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert sites(qrecipe.plan(model, recipe(), ROWS))[":cat"].verdict == "passthrough"
    found = sites(qrecipe.plan(model, named(b="float"), ROWS))
    assert found[":cat"].verdict == "float"
    assert "b" in found[":cat"].reason
    assert verdicts(plan_of("decoder"))[":cat"] == "float"


def test_a_fixed_range_operation_is_quantized_behind_a_quantized_producer():
    gate = sites(plan_of("squeeze_excite"))["gate"]
    assert gate.verdict == "quantized"
    assert gate.qconfig.activation.observer.name == "fixed_qparams"
    assert gate.qconfig.activation.observer.arguments == {"scale": 1 / 256, "zero_point": 0}


def test_a_fixed_range_operation_behind_a_float_producer_stays_float_and_counts_as_honoured():
    found = sites(plan_of("squeeze_excite", named(up="float", gate="int8")))
    assert found["gate"].verdict == "float"
    assert "up" in found["gate"].reason
    alone = net_of(lambda self, x: self.fc(torch.sigmoid(x)), fc=nn.Linear(6, 6))
    found = sites(qrecipe.plan(alone, recipe('[rules.function]\n"torch.sigmoid" = "int8"'), ROWS))
    assert found[":sigmoid"].verdict == "float"
    assert found["fc"].verdict == "quantized"


def test_per_channel_weights_become_per_tensor_on_a_transposed_convolution_and_count_as_honoured():
    found = sites(plan_of("decoder", named(up="int8")))
    assert found["up"].verdict == "quantized"
    assert found["up"].qconfig.weight.qscheme == "per_tensor_symmetric"
    assert found["last"].qconfig.weight.qscheme == "per_channel_symmetric"
    assert "per-tensor" in found["up"].reason


# --- rules in a plan


def test_every_rule_ends_in_a_verdict():
    rules = recipe(
        """
        [rules.module_name]
        "layer1" = "float"
        "layer1.0" = "int8"
        "layer1.1" = "int8"
        "fc" = { qconfig = "float", reason = "the head is tiny" }
        [rules.module_type]
        "torch.nn.LSTM" = "float"
        """
    )
    plan = plan_of("residual", rules)
    assert rule_verdicts(plan) == {
        "": "applied",
        "layer1": "shadowed",
        "layer1.0": "applied",
        "layer1.1": "applied",
        "fc": "applied",
        "torch.nn.LSTM": "unused",
    }
    assert sites(plan)["fc"].reason == "the head is tiny"
    assert "the head is tiny" in str(plan)


def test_a_plan_with_errors_raises_all_of_them_and_carries_the_complete_plan():
    rules = recipe(
        f"""{INT8_ACTIVATION}
        [rules.module_name]
        "fc" = "signed"
        "convl" = "float"
        "layer1.0.bn1" = "float"
        """
    )
    with pytest.raises(PlanError) as caught:
        plan_of("residual", rules)
    assert {f.code for f in caught.value.findings} == {"QR301", "QR303", "QR304"}
    plan = caught.value.plan
    assert len(plan.sites) == 11
    verdict = rule_verdicts(plan)
    assert verdict["convl"] == "unmatched"
    assert verdict["fc"] == "unsupported"
    with pytest.raises(UnmatchedRuleError):
        plan_of("residual", named(convl="float"))


# --- purity


def test_planning_leaves_the_model_bit_identical():
    model = Residual().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    qrecipe.plan(model, recipe(), IMAGE)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes


def test_what_stays_float_says_why():
    for name in NETS:
        for site in plan_of(name).sites:
            assert site.verdict != "float" or site.reason, f"{name}: {site.name}"


def test_a_decoder_and_an_mlp_count_their_sites_in_the_first_line():
    assert "4 sites" in str(qrecipe.plan(Decoder().eval(), recipe(), IMAGE)).splitlines()[0]
    assert "2 quantized" in str(qrecipe.plan(Mlp().eval(), recipe(), ROWS)).splitlines()[0]


def test_functions_that_no_kernel_runs_are_float_under_a_wide_rule():
    def forward(self, x):
        return F.softmax(self.fc(x), -1) - x

    plan = qrecipe.plan(net_of(forward, fc=nn.Linear(6, 6)), recipe(), ROWS)
    assert verdicts(plan) == {"fc": "quantized", ":softmax": "float", ":sub": "float"}
