"""What a backend cannot honour: an error or a reason, by how the rule names it."""

from __future__ import annotations

import pytest
import torch
from nets import NETS
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
from qrecipe.errors.findings import ConflictError, UnsupportedError

# --- what can't be honoured


def test_signed_activations_are_refused_on_x86_with_the_dtype_that_it_takes():
    rules = f'{INT8_ACTIVATION}\n[rules]\nglobal = "signed"'
    with pytest.raises(UnsupportedError) as caught:
        plan_of("mlp", recipe(rules))
    (finding,) = caught.value.findings
    assert finding.code == "QR303"
    assert "uint8" in finding.hint
    assert finding.location.source == 'dtype = "int8"'
    assert [at.source for _, at in finding.related] == ['global = "signed"']
    assert verdicts(caught.value.plan) == {"fc1": "float", "fc2": "float"}


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("role", "settings"),
    [
        ("weight", 'dtype = "uint8"\nqscheme = "per_channel_affine"'),
        ("activation", 'dtype = "int8"'),
    ],
)
def test_a_dtype_that_no_kernel_takes_is_shown_where_it_is_set(role, settings, inline):
    rules = f"[tensor.{role}]\n{settings}\n"
    if inline:
        rules += '[rules.module_name]\nfc1 = { weight = "weight", activation = "activation" }\n'
    with pytest.raises(UnsupportedError) as caught:
        plan_of("mlp", recipe(rules))
    for finding in caught.value.findings:
        assert finding.code == "QR303"
        assert finding.location.source == settings.partition("\n")[0]
        assert [text for text, _ in finding.related] == ["decided by"]


def test_what_is_no_setting_of_a_tensor_is_shown_at_the_rule():
    net = net_of(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    dynamic = recipe('[rules.module_name]\nconv = "int8-dynamic"', base="builtin:x86-dynamic")
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(net, dynamic, IMAGE)
    assert caught.value.findings[0].location.source == 'conv = "int8-dynamic"'


@pytest.mark.parametrize(
    "key", ['module_name]\n"fc1"', 'module_type]\n"torch.nn.Linear"', 'function]\n"torch.add"']
)
def test_a_rule_that_names_an_operation_is_an_error_where_the_kernel_is_missing(key):
    model = net_of(lambda self, x: self.fc1(x) + x, fc1=nn.Linear(6, 6))
    with pytest.raises(UnsupportedError):
        qrecipe.plan(model, recipe(f'{INT8_ACTIVATION}\n[rules.{key} = "signed"'), ROWS)


_EVERYTHING = net_of(
    lambda self, x: self.softmax(
        torch.flatten(torch.sigmoid(self.norm(self.act(self.pool(self.conv(x) + x)))), 1)
    ),
    conv=nn.Conv2d(3, 3, 1),
    pool=nn.MaxPool2d(2),
    act=nn.Hardswish(),
    norm=nn.LayerNorm(4),
    softmax=nn.Softmax(-1),
)


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
@pytest.mark.parametrize("qconfig", ["int8-dynamic", "weights"])
@pytest.mark.parametrize(
    ("site", "key"),
    [
        ("pool", 'module_name]\n"pool"'),
        ("pool", 'module_type]\n"torch.nn.MaxPool2d"'),
        (":flatten", 'module_name]\n":flatten"'),
        (":flatten", 'function]\n"torch.flatten"'),
        (":sigmoid", 'module_name]\n":sigmoid"'),
        (":sigmoid", 'function]\n"torch.sigmoid"'),
        ("softmax", 'module_name]\n"softmax"'),
        ("softmax", 'module_type]\n"torch.nn.Softmax"'),
        ("act", 'module_name]\n"act"'),
        ("norm", 'module_type]\n"torch.nn.LayerNorm"'),
        (":add", 'function]\n"torch.add"'),
    ],
)
def test_a_rule_that_names_an_operation_without_its_mode_is_an_error(site, key, qconfig, executor):
    asked = (
        '[tensor.each]\ndtype = "uint8"\nis_dynamic = true\n'
        '[qconfig.int8-dynamic]\nweight = "weight"\nactivation = "each"\n'
        '[qconfig.weights]\nweight = "weight"\n'
    )
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(
            _EVERYTHING, recipe(f'{asked}[rules.{key} = "{qconfig}"'), IMAGE, executor=executor
        )
    (finding,) = caught.value.findings
    word = {"int8-dynamic": "dynamic", "weights": "weight-only"}[qconfig]
    assert finding.message.endswith(f"cannot be honoured at {site}")
    assert f"x86 has no {word} kernel" in finding.hint
    assert sites(caught.value.plan)[site].verdict == "float"


@pytest.mark.parametrize("rule", ['global = "each"', 'module_name."*" = "each"'])
def test_what_follows_does_so_under_a_rule_that_does_not_name_it(rule):
    dynamic = recipe(
        '[tensor.each]\ndtype = "uint8"\nis_dynamic = true\n'
        '[qconfig.each]\nweight = "weight"\nactivation = "each"\n'
        f"[rules]\n{rule}\n"
    )
    model = net_of(lambda self, x: self.fc(torch.flatten(x, 1)), fc=nn.Linear(6, 4))
    assert verdicts(qrecipe.plan(model, dynamic, ROWS)) == {":flatten": "float", "fc": "quantized"}


def test_a_named_rule_is_an_error_if_one_of_its_sites_has_no_kernel_and_others_have():
    def forward(self, x):
        return self.b(self.a(x))

    model = net_of(
        forward,
        a=nn.Conv2d(3, 3, 3),
        b=nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    )
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(model, recipe('[rules.module_type]\n"torch.nn.Conv2d" = "int8"'), IMAGE)
    assert "at b" in str(caught.value)
    plan = qrecipe.plan(model, recipe(), IMAGE)
    assert verdicts(plan) == {"a": "quantized", "b": "float"}
    assert "circular" in sites(plan)["b"].reason


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


SIGNED = """
backend = "{backend}"
[tensor.weight]
quant_min = -127
quant_max = 127
eps = 0.000244140625
[tensor.activation]
dtype = "int8"
qscheme = "per_tensor_symmetric"
reduce_range = false
quant_min = -127
quant_max = 127
eps = {eps}
"""


@pytest.mark.parametrize("backend", ["qnnpack", "executorch"])
def test_signed_activations_need_the_eps_that_the_kernels_divide_by(backend):
    enough = recipe(SIGNED.format(backend=backend, eps=2.0**-12))
    assert "float" not in verdicts(plan_of("mlp", enough)).values()
    for eps in ("0.000244", "1e-8"):
        with pytest.raises(UnsupportedError) as caught:
            plan_of("mlp", recipe(SIGNED.format(backend=backend, eps=eps)))
        (finding,) = caught.value.findings
        assert finding.code == "QR303"
        assert "eps >= 0.000244140625 for activations" in finding.hint
    missing = SIGNED.replace("eps = {eps}\n", "").format(backend=backend)
    with pytest.raises(UnsupportedError, match="set eps"):
        plan_of("mlp", recipe(missing))


@pytest.mark.parametrize("backend", ["qnnpack", "executorch"])
def test_weights_that_reach_below_the_kernels_range_are_refused(backend):
    wide = SIGNED.replace("quant_min = -127", "quant_min = -128", 1)
    with pytest.raises(UnsupportedError) as caught:
        plan_of("mlp", recipe(wide.format(backend=backend, eps=2.0**-12)))
    assert "in -127..127 here, not -128..127" in caught.value.findings[0].hint


def test_what_joins_producers_with_different_specs_stays_float():
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

    def forward(self, x):
        x = self.first(x)
        return torch.cat([self.a(x), self.b(x)])

    layers = {name: nn.Linear(6, 6) for name in ("first", "a", "b")}
    model = net_of(forward, **layers)
    found = sites(qrecipe.plan(model, recipe(rules), ROWS))
    assert found[":cat"].verdict == "float"
    assert found[":cat"].reason == "its producers a, b have different activation specs"
    assert sites(qrecipe.plan(model, recipe(), ROWS))[":cat"].verdict == "passthrough"
