"""Models that cannot be traced: dynamic and weight-only rules are executed module by module."""

from __future__ import annotations

import copy

import pytest
import torch
from differential import snapshot
from nets import NETS, UNTRACEABLE, Attention
from plans import net_of, sites, verdicts
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import (
    AuditError,
    PlanError,
    TraceError,
    UnmatchedRuleError,
    UnsupportedError,
)
from qrecipe.execution.eager import audit as eager_audit

DYNAMIC = "builtin:x86-dynamic"
BOTH = qrecipe.parse_recipe(
    'format = 1\nname = "both"\nextends = ["builtin:x86-dynamic", "builtin:embedding-weight-only"]'
)


def with_rules(rules):
    return qrecipe.parse_recipe(f'format = 1\nextends = "{DYNAMIC}"\n{rules}')


@pytest.fixture
def model():
    return UNTRACEABLE.model()


@pytest.fixture
def tokens():
    return UNTRACEABLE.batches(1)[0]


def test_the_plan_says_that_it_is_executed_in_eager_mode_and_why(model, tokens):
    plan = qrecipe.plan(model, DYNAMIC, tokens)
    assert plan.executor == "eager"
    assert "executed in eager mode" in str(plan)
    (warning,) = [each for each in plan.warnings if each.code == "QR210"]
    assert "if x.sum() > 0:" in warning.message
    assert verdicts(plan) == {
        "embed": "float",
        "attention.norm": "float",
        "attention.qkv": "quantized",
        "attention.softmax": "float",
        "attention.out": "quantized",
        "head": "quantized",
    }


def test_the_modules_of_the_plan_are_swapped_and_no_other(model, tokens):
    converted = qrecipe.quantize(model, BOTH, example_inputs=tokens)
    assert type(converted) is type(model)
    assert type(converted.embed) is nnq.Embedding
    assert type(converted.attention.qkv) is nnq.dynamic.Linear
    assert type(converted.attention.norm) is nn.LayerNorm
    assert output_sqnr_db(model(tokens), converted(tokens)) > 30
    assert not any(hasattr(module, "qconfig") for module in converted.modules())


def test_what_belongs_to_fx_is_none_and_provenance_is_there(model, tokens):
    compiled = qrecipe.compile(model, DYNAMIC, tokens)
    assert compiled.graph_module is None
    assert compiled.qconfig_mapping is None
    assert compiled.backend_config is None
    assert compiled.prepare_custom_config is None
    assert compiled.convert_custom_config is None
    converted = compiled.convert(compiled.prepare())
    known = qrecipe.provenance(copy.deepcopy(converted))
    assert known.fingerprint == compiled.recipe.fingerprint
    assert '"executor": "eager"' in known.plan


def test_a_transformer_with_control_flow_gets_what_one_without_gets():
    """The same weights and recipe, traced and untraced: the same numbers."""

    class Encoder(nn.Module):
        def __init__(self, branches):
            super().__init__()
            self.branches = branches
            self.layers = nn.ModuleList([Attention(), Attention()])
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            if self.branches and x.sum() == 0:
                return x
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    plain = Encoder(branches=False).eval()
    branching = Encoder(branches=True).eval()
    branching.load_state_dict(plain.state_dict())
    x = NETS["attention"].batches(1)[0]
    plans = [qrecipe.plan(m, DYNAMIC, x) for m in (plain, branching)]
    assert [plan.executor for plan in plans] == ["fx", "eager"]
    chosen = [[s.name for s in plan.sites if s.mode == "dynamic"] for plan in plans]
    assert (
        chosen[0]
        == chosen[1]
        == [
            *("layers.0.qkv", "layers.0.out", "layers.1.qkv", "layers.1.out", "head"),
        ]
    )
    traced, untraced = (qrecipe.quantize(m, DYNAMIC, example_inputs=x) for m in (plain, branching))
    assert torch.equal(traced(x), untraced(x))


def test_the_callers_model_is_bit_identical_afterwards(model, tokens):
    before = snapshot(model)
    converted = qrecipe.quantize(model, BOTH, example_inputs=tokens)
    assert snapshot(model) == before
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert own.isdisjoint(
        t.data_ptr() for t in converted.state_dict().values() if isinstance(t, torch.Tensor)
    )


def test_a_qconfig_that_the_caller_left_on_a_module_decides_nothing(model, tokens):
    model.attention.norm.qconfig = torch.ao.quantization.default_dynamic_qconfig
    model.embed.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=tokens)
    assert type(converted.embed) is nn.Embedding
    assert model.embed.qconfig is torch.ao.quantization.float_qparams_weight_only_qconfig


def test_static_rules_that_would_apply_keep_the_error_of_the_trace(model, tokens):
    with pytest.raises(TraceError, match="cannot be traced"):
        qrecipe.plan(model, "builtin:x86-static", tokens)


def test_static_rules_that_meet_nothing_are_no_hindrance(model, tokens):
    rules = """
[tensor.static]
observer = "minmax"
dtype = "uint8"
qscheme = "per_tensor_affine"
[qconfig.static]
weight = "weight"
activation = "static"
[rules.module_type]
"torch.nn.Conv2d" = "static"
"""
    assert qrecipe.plan(model, with_rules(rules), tokens).executor == "eager"


def test_a_rule_for_functions_needs_a_trace_unless_it_is_optional(model, tokens):
    rule = '[rules.function]\n"torch.matmul" = "int8-dynamic"\n'
    with pytest.raises(TraceError):
        qrecipe.plan(model, with_rules(rule), tokens)


def test_training_and_roots_need_a_trace(model, tokens):
    with pytest.raises(TraceError):
        qrecipe.plan(model, with_rules('phase = "qat"'), tokens)
    rooted = with_rules('[fx]\nroots = ["attention"]\n')
    assert qrecipe.plan(model, rooted, tokens).executor == "fx"


def test_a_rule_that_matches_nothing_is_an_error_there_too(model, tokens):
    rule = '[rules.module_name]\n"attention.qkw" = "float"\n'
    with pytest.raises(UnmatchedRuleError, match=r"attention\.qkv"):
        qrecipe.plan(model, with_rules(rule), tokens)


def test_a_module_with_two_names_is_swapped_under_both(tokens):
    model = UNTRACEABLE.model()
    model.second = model.head
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=tokens)
    assert converted.second is converted.head
    assert type(converted.head) is nnq.dynamic.Linear


def test_torchs_own_encoder_is_opened_as_in_a_trace():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    model = net_of(
        lambda self, x: self.head(self.layer(x)) if x.sum() > 0 else self.head(x),
        layer=layer,
        head=nn.Linear(8, 4),
    )
    x = torch.rand(2, 3, 8)
    plan = qrecipe.plan(model, DYNAMIC, x)
    attention = [f"layer.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    quantized = {*attention, "layer.linear1", "layer.linear2", "head"}
    found = {name for name, verdict in verdicts(plan).items() if verdict == "quantized"}
    assert found == quantized
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=x)
    assert all(type(converted.get_submodule(name)) is nnq.dynamic.Linear for name in quantized)
    assert output_sqnr_db(model(x), converted(x)) > 30


def test_modules_that_a_recipe_keeps_out_of_traces_keep_their_inside(model, tokens):
    kept = with_rules('[fx]\nnon_traceable_module_name = ["attention"]\n')
    plan = qrecipe.plan(model, kept, tokens)
    assert sites(plan)["attention"].verdict == "float"
    assert "attention.qkv" not in sites(plan)


def test_a_forward_that_reads_a_weight_is_an_error_of_the_audit_and_not_of_the_user():
    model = net_of(
        lambda self, x: (
            x @ self.fc.weight.t() if x.sum() > 1e9 else self.fc(x) + self.fc.weight.sum()
        ),
        fc=nn.Linear(6, 6),
    )
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(model, DYNAMIC, example_inputs=torch.rand(2, 6))
    assert [finding.code for finding in caught.value.findings] == ["QR413"]
    assert "weight" in caught.value.findings[0].hint


def test_a_kernel_that_computes_something_else_is_found(model, tokens, monkeypatch):
    swap = nnq.dynamic.Linear.forward
    monkeypatch.setattr(
        nnq.dynamic.Linear,
        "forward",
        lambda self, x: swap(self, x) * (1.1 if self.out_features == 4 else 1),
    )
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(model, DYNAMIC, example_inputs=tokens)
    (finding,) = caught.value.findings
    assert finding.code == "QR411"
    assert "head" in finding.message


def test_a_module_that_was_not_swapped_is_found(model, tokens, monkeypatch):
    monkeypatch.setattr(
        "qrecipe.execution.eager.executor.quantize_dynamic", lambda model, rules, inplace: model
    )
    with pytest.raises(AuditError, match="is planned as dynamic, but became float"):
        qrecipe.quantize(model, DYNAMIC, example_inputs=tokens)
    assert eager_audit.RIGHT_DB == 30


# --- what runs on the way


class Counting(nn.Module):
    """Writes to a buffer in each forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x) if x.sum() < 1e9 else x


def test_buffers_that_a_forward_writes_are_neither_the_callers_nor_worn_by_the_audit():
    model, x = Counting().eval(), torch.rand(2, 6)
    converted = qrecipe.quantize(model, DYNAMIC, [x] * 3, progress=lambda done, total: None)
    assert model.calls == 0
    assert qrecipe.quantize(model, DYNAMIC, example_inputs=x).calls == 0
    assert converted.calls == 3  # as if it had seen the batches


def test_a_module_that_the_model_also_keeps_in_a_plain_list_is_found_unreached():
    model = net_of(lambda self, x: self.order[0](x) if x.sum() < 1e9 else x, a=nn.Linear(6, 6))
    model.order = [model.a]
    with pytest.raises(AuditError, match="still calls the original module") as caught:
        qrecipe.quantize(model, DYNAMIC, example_inputs=torch.rand(2, 6))
    assert "nn.ModuleList" in caught.value.findings[0].hint


def branching():
    return net_of(
        lambda self, x: self.a(x) if x.sum() > 0 else self.b(x),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
    )


def test_modules_that_copy_stay_float_between_those_that_are_swapped():
    def forward(self, x):
        return self.fc(self.drop(self.pool(x)) if x.sum() < 1e9 else x)

    model = net_of(forward, pool=nn.MaxPool1d(2), drop=nn.Dropout(), fc=nn.Linear(4, 3))
    plan = qrecipe.plan(model, DYNAMIC, torch.rand(2, 3, 8))
    assert plan.executor == "eager"
    assert verdicts(plan) == {"pool": "float", "fc": "quantized"}


def test_what_the_example_inputs_do_not_reach_is_named():
    plan = qrecipe.plan(branching(), DYNAMIC, torch.rand(2, 6))
    (warning,) = [each for each in plan.warnings if each.code == "QR210"]
    assert warning.notes == ("not reached by the example inputs, and so left float: b",)


def test_a_first_batch_on_another_way_than_the_example_is_no_error():
    x = torch.rand(2, 6)
    converted = qrecipe.quantize(branching(), DYNAMIC, [-x], example_inputs=x)
    assert type(converted.a) is nnq.dynamic.Linear
    assert type(converted.b) is nn.Linear


def test_a_recurrent_layer_may_still_be_told_to_flatten_its_parameters():
    def forward(self, x):
        self.lstm.flatten_parameters()
        return self.lstm(x)[0] if x.sum() < 1e9 else x

    model, x = net_of(forward, lstm=nn.LSTM(6, 6)), torch.rand(3, 2, 6)
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=x)
    assert output_sqnr_db(model(x), copy.deepcopy(converted)(x)) > 30


def test_inputs_that_do_not_fit_are_told_as_such_and_not_as_a_trace_that_failed():
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(branching(), DYNAMIC, torch.rand(2, 7))
    assert [finding.code for finding in caught.value.findings] == ["QR307"]


def test_training_mode_of_a_prepared_model_does_not_reach_the_reference():
    model = net_of(
        lambda self, x: self.fc(self.drop(x)) if x.sum() < 1e9 else x,
        drop=nn.Dropout(0.9),
        fc=nn.Linear(6, 6),
    )
    x = torch.rand(8, 6)
    compiled = qrecipe.compile(model, DYNAMIC, x)
    converted = compiled.convert(compiled.prepare().train())  # a warning would fail the test
    assert output_sqnr_db(model(x), converted(x)) > 30


def packing(kind, result):
    """A recurrent layer that is called with sequences of several lengths, packed in forward."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, state = self.rnn(packed)
        return self.fc(result(output, state))

    return net_of(forward, rnn=kind(6, 8, batch_first=True), fc=nn.Linear(8, 3))


RESULTS = {
    "packed": lambda output, state: output.data,
    "padded": lambda output, state: pad_packed_sequence(output, batch_first=True)[0],
    "state": lambda output, state: (state[0] if isinstance(state, tuple) else state)[-1],
}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("result", list(RESULTS))
def test_a_recurrent_layer_takes_a_packed_sequence_as_in_float(kind, result, tmp_path):
    torch.manual_seed(0)
    model, inputs = packing(kind, RESULTS[result]), (torch.rand(3, 7, 6), torch.tensor([4, 7, 2]))
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=inputs)
    assert type(converted.rnn).__module__.endswith("quantized.dynamic.modules.rnn")
    with torch.no_grad():
        expected, output = model(*inputs), converted(*inputs)
    assert output_sqnr_db(expected, output) > 30
    qrecipe.save_quantized(converted, tmp_path / "packed.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "packed.safetensors", model)
    with torch.no_grad():
        assert torch.equal(output, loaded(*inputs))


def test_a_packed_sequence_alone_is_computed_as_the_sequence_itself():
    model, x = packing(nn.LSTM, RESULTS["padded"]), torch.rand(1, 5, 6)
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=(x, torch.tensor([5])))
    with torch.no_grad():
        assert torch.equal(converted(x, torch.tensor([5])), converted.fc(converted.rnn(x)[0]))


def test_a_packed_sequence_as_an_input_of_a_trace_is_refused_in_the_plan():
    model = net_of(
        lambda self, x: self.fc(self.rnn(x)[1][-1]), rnn=nn.GRU(6, 8), fc=nn.Linear(8, 3)
    )
    packed = pack_padded_sequence(torch.rand(5, 2, 6), torch.tensor([5, 3]))
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(model, DYNAMIC, (packed,))
    assert "PackedSequence" in caught.value.findings[0].hint
    recipe = qrecipe.suggest(model, (packed,))
    converted = qrecipe.quantize(model, recipe, example_inputs=(packed,))
    assert type(converted.rnn) is nn.GRU
    assert type(converted.fc) is not nn.Linear
