"""Verdicts and reasons: what a backend can honour, what it substitutes, what follows what."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, Decoder, Mlp, Residual
from torch import nn

import qrecipe
from qrecipe.errors import ConflictError, PlanError, UnmatchedRuleError, UnsupportedError

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("QRECIPE_UPDATE_GOLDEN") == "1"
IMAGE = torch.zeros(1, 3, 8, 8)
ROWS = torch.zeros(2, 6)


def recipe(rules="", *, base="builtin:x86-static", head=""):
    return qrecipe.parse_recipe(f'format = 1\nextends = "{base}"\n{head}\n{rules}\n')


def named(**rules):
    """A recipe of module_name rules, ``__`` for a dot."""
    lines = "".join(f'"{key.replace("__", ".")}" = "{value}"\n' for key, value in rules.items())
    return recipe(f"[rules.module_name]\n{lines}")


def net_of(forward, **modules):
    net = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(net, name, module)
    return net.eval()


def plan_of(name, a_recipe=None):
    net = NETS[name]
    return qrecipe.plan(net.model(), a_recipe or recipe(), net.batches(1)[0])


def sites(plan):
    return {site.name: site for site in plan.sites}


def verdicts(plan):
    return {site.name: site.verdict for site in plan.sites}


def rule_verdicts(plan):
    return {verdict.rule.key: verdict.verdict for verdict in plan.rules}


# --- golden plans

BUILTIN = ("x86-static", "x86-vnni-static", "x86-static-histogram", "arm-static")


@pytest.mark.parametrize("name", BUILTIN)
def test_the_plan_of_a_shipped_recipe_stays_as_it_was(name):
    """QRECIPE_UPDATE_GOLDEN=1 writes the files anew; read the difference before committing it."""
    plan = qrecipe.plan(NETS["residual"].model(), f"builtin:{name}", IMAGE)
    decoder = qrecipe.plan(NETS["decoder"].model(), f"builtin:{name}", IMAGE)
    text = f"{_unstyled(plan)}\n\n{_unstyled(decoder)}\n"
    path = GOLDEN / f"{name}.txt"
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BUILTIN)
def test_the_json_of_a_shipped_recipes_plan_stays_as_it_was(name):
    plan = qrecipe.plan(NETS["squeeze_excite"].model(), f"builtin:{name}", IMAGE)
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        path.write_text(plan.to_json() + "\n", encoding="utf-8")
    assert plan.to_json() + "\n" == path.read_text(encoding="utf-8")


def _unstyled(plan):
    return "\n".join(line.rstrip() for line in str(plan).splitlines())


def test_golden_files_know_no_machine():
    for path in GOLDEN.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not any(part in text for part in (str(Path.home()), os.getcwd(), "/tmp/", "\\\\"))


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
    assert found["pool"].rule.qconfig is None


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


# --- what can't be honoured

INT8_ACTIVATION = """
[tensor.signed]
observer = "minmax"
dtype = "int8"
qscheme = "per_tensor_symmetric"
[qconfig.signed]
weight = "weight"
activation = "signed"
"""


def test_signed_activations_are_refused_on_x86_with_the_dtype_that_it_takes():
    rules = f'{INT8_ACTIVATION}\n[rules]\nglobal = "signed"'
    with pytest.raises(UnsupportedError) as caught:
        plan_of("mlp", recipe(rules))
    (finding,) = caught.value.findings
    assert finding.code == "QR303"
    assert "uint8" in finding.hint
    assert finding.location.source == 'global = "signed"'
    assert verdicts(caught.value.plan) == {"fc1": "float", "fc2": "float"}


@pytest.mark.parametrize(
    "key", ['module_name]\n"fc1"', 'module_type]\n"torch.nn.Linear"', 'function]\n"torch.add"']
)
def test_a_rule_that_names_an_operation_is_an_error_where_the_kernel_is_missing(key):
    model = net_of(lambda self, x: self.fc1(x) + x, fc1=nn.Linear(6, 6))
    with pytest.raises(UnsupportedError):
        qrecipe.plan(model, recipe(f'{INT8_ACTIVATION}\n[rules.{key} = "signed"'), ROWS)


def test_a_named_rule_is_an_error_if_one_of_its_sites_has_no_kernel_and_others_have():
    def forward(self, x):
        return self.b(self.a(x))

    model = net_of(forward, a=nn.ConvTranspose2d(3, 3, 2), b=nn.ConvTranspose2d(3, 4, 2))
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(
            model, recipe('[rules.module_type]\n"torch.nn.ConvTranspose2d" = "int8"'), IMAGE
        )
    assert "at b" in str(caught.value)
    plan = qrecipe.plan(model, recipe(), IMAGE)
    assert verdicts(plan) == {"a": "quantized", "b": "float"}
    assert "channels" in sites(plan)["b"].reason


@pytest.mark.parametrize("key", ["body", "body.*", "b*"])
def test_a_container_or_glob_is_an_error_only_if_it_can_be_honoured_nowhere(key):
    rules = recipe(f'[rules]\nglobal = "float"\n[rules.module_name]\n"{key}" = "int8"')
    some = net_of(lambda self, x: self.body(x), body=nn.Sequential(nn.GELU(), nn.Linear(6, 6)))
    plan = qrecipe.plan(some, rules, ROWS)
    assert verdicts(plan) == {"body.0": "float", "body.1": "quantized"}
    assert "GELU" in sites(plan)["body.0"].reason
    none = net_of(lambda self, x: self.body(x), body=nn.Sequential(nn.GELU(), nn.SiLU()))
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(none, rules, ROWS)
    assert rule_verdicts(caught.value.plan)[key] == "unsupported"


def test_a_wide_rule_whose_supported_sites_all_went_to_other_rules_is_no_error():
    model = net_of(lambda self, x: self.body(x), body=nn.Sequential(nn.GELU(), nn.Linear(6, 6)))
    plan = qrecipe.plan(model, named(body__1="float"), ROWS)
    assert verdicts(plan) == {"body.0": "float", "body.1": "float"}


DYNAMIC = """
[tensor.dynamic]
dtype = "uint8"
is_dynamic = true
[qconfig.int8-dynamic]
weight = "weight"
activation = "dynamic"
"""


def test_dynamic_quantization_is_offered_where_the_kernel_has_it_and_refused_elsewhere():
    lstm = recipe(f'{DYNAMIC}\n[rules.module_type]\n"torch.nn.LSTM" = "int8-dynamic"')
    found = sites(plan_of("recurrent", lstm))
    assert found["lstm"].verdict == "quantized"
    assert found["lstm"].mode == "dynamic"
    assert sites(plan_of("recurrent"))["lstm"].reason.endswith("it can be dynamic")
    conv = recipe(f'{DYNAMIC}\n[rules.module_name]\n"conv1" = "int8-dynamic"')
    with pytest.raises(UnsupportedError, match="dynamic"):
        plan_of("residual", conv)


EMBEDDING = """
[tensor.embedding]
observer = "per_channel_minmax"
dtype = "uint8"
qscheme = "per_channel_affine_float_qparams"
[qconfig.weight-only]
weight = "embedding"
[rules.module_type]
"torch.nn.Embedding" = "weight-only"
"""


def test_an_embedding_is_quantized_by_its_weight_only():
    def forward(self, tokens):
        return self.fc(self.embedding(tokens))

    model = net_of(forward, embedding=nn.Embedding(10, 6), fc=nn.Linear(6, 6))
    found = sites(qrecipe.plan(model, recipe(EMBEDDING), torch.arange(4)))
    assert found["embedding"].mode == "weight_only"
    assert found["embedding"].qconfig.activation is None
    assert found["fc"].input is not None


def test_a_weight_only_linear_is_refused():
    rules = EMBEDDING.replace("torch.nn.Embedding", "torch.nn.Linear")
    with pytest.raises(UnsupportedError, match="weight-only"):
        plan_of("mlp", recipe(rules))


def test_unsigned_weights_are_refused_which_torch_itself_would_not_notice():
    rules = """
    [tensor.weight]
    observer = "minmax"
    dtype = "uint8"
    qscheme = "per_tensor_affine"
    """
    with pytest.raises(UnsupportedError) as caught:
        plan_of("mlp", recipe(rules))
    assert "int8 weights" in caught.value.findings[0].hint


def test_consumers_of_one_float_tensor_with_different_specs_conflict():
    rules = """
    [tensor.wide]
    observer = "histogram"
    dtype = "uint8"
    qscheme = "per_tensor_affine"
    [qconfig.wide]
    weight = "weight"
    activation = "wide"
    [rules.module_name]
    "b" = "wide"
    """
    net = NETS["binary"]
    with pytest.raises(ConflictError) as caught:
        qrecipe.plan(net.model(), recipe(rules), net.batches(1)[0])
    (finding,) = [f for f in caught.value.findings if f.code == "QR304"]
    assert "a" in finding.message
    assert "b" in finding.message
    assert finding.related

    def chain(self, x):
        return self.b(self.a(x))

    model = net_of(chain, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    plan = qrecipe.plan(model, recipe(rules), ROWS)
    assert sites(plan)["b"].input is None


def test_consumers_of_one_parameter_with_different_specs_conflict():
    def forward(self, x):
        return self.a(x) + self.shift, self.b(x) * self.shift

    model = net_of(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.shift = nn.Parameter(torch.ones(6))
    rules = """
    [tensor.wide]
    observer = "histogram"
    dtype = "uint8"
    qscheme = "per_tensor_affine"
    [qconfig.wide]
    activation = "wide"
    [rules.module_name]
    ":mul" = "wide"
    """
    with pytest.raises(ConflictError):
        qrecipe.plan(model, recipe(rules), ROWS)


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


# --- explain


def test_a_site_is_explained_by_its_rule_its_verdict_and_its_specs():
    text = plan_of("residual", named(layer1="float", layer1__0="int8")).explain("layer1.0.conv1")
    assert "Conv2d + BatchNorm2d + ReLU" in text
    assert "quantized" in text
    assert 'module_name "layer1.0"' in text
    assert 'shadowed  module_name "layer1"' in text
    assert "<recipe>:6" in text
    assert "per_channel_minmax" in text


def test_a_member_is_explained_by_its_group():
    text = plan_of("residual").explain("bn1")
    assert "bn1 is a member" in text
    assert "conv1" in text


def test_an_alias_is_explained_under_its_canonical_name():
    text = plan_of("aliased").explain("second")
    assert "second is another name of first" in text
    assert "Linear" in text


def test_a_container_is_explained_by_what_it_holds():
    plan = plan_of("residual")
    text = plan.explain("layer1.0")
    assert "3 sites" in text
    assert "layer1.0:add" in text
    assert "layer1.1" not in text
    assert "11 sites" in plan.explain("")


def test_every_call_of_a_name_can_be_explained_with_or_without_its_number():
    plan = plan_of("binary")
    assert plan.explain(":add#0") == plan.explain(":add")
    assert "alpha" in plan.explain(":add#1")


def test_a_module_that_is_never_called_is_explained_as_such():
    assert "nothing" in plan_of("aliased").explain("unused")


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(PlanError) as caught:
        plan_of("residual").explain("layer1.0.convl")
    (finding,) = caught.value.findings
    assert finding.code == "QR310"
    assert "layer1.0.conv" in finding.hint


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
