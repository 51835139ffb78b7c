"""The executor of a plan: chosen for the model, or asked for by the recipe or the caller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import NETS, UNTRACEABLE
from plans import recipe
from torch import nn
from torch.ao.nn import quantized as nnq

import qrecipe
from qrecipe.authoring.lock.check import check_lock
from qrecipe.authoring.lock.file import write_lock
from qrecipe.errors.findings import PlanError, SchemaError, TraceError, UnsupportedError
from qrecipe.planning.plan import Plan

DYNAMIC = "builtin:x86-dynamic"


def asking(executor, rules="", base=DYNAMIC):
    return recipe(rules, base=base, head=f'executor = "{executor}"')


@pytest.fixture
def mlp():
    return NETS["mlp"].model()


@pytest.fixture
def rows():
    return NETS["mlp"].batches(1)[0]


@pytest.fixture
def untraceable():
    return UNTRACEABLE.model()


@pytest.fixture
def tokens():
    return UNTRACEABLE.batches(1)[0]


def test_the_plan_says_why_it_has_its_executor(mlp, rows, untraceable, tokens):
    traced, chosen = qrecipe.plan(mlp, DYNAMIC, rows), qrecipe.plan(untraceable, DYNAMIC, tokens)
    asked = qrecipe.plan(mlp, asking("fx"), rows)
    assert (traced.executor, traced.executor_reason) == ("fx", "the model can be traced")
    assert chosen.executor == "eager"
    assert chosen.executor_reason is not None
    assert "if x.sum() > 0:" in chosen.executor_reason
    assert (asked.executor, asked.executor_reason) == ("fx", "it is asked for")
    assert "; executed" not in repr(traced)
    assert "; executed in eager mode>" in repr(chosen)
    assert "; executed in FX graph mode, as asked" in repr(asked)


def test_the_reason_is_read_back_and_may_be_missing_in_what_was_stored_before(mlp, rows):
    plan = qrecipe.plan(mlp, DYNAMIC, rows)
    assert Plan.from_json(plan.to_json()) == plan
    stored = plan.to_dict()
    del stored["executor_reason"]
    assert Plan.from_dict(stored).executor_reason is None


def test_a_model_that_can_be_traced_is_quantized_module_by_module_if_asked(mlp, rows):
    plan = qrecipe.plan(mlp, asking("eager"), rows)
    assert plan.executor == "eager"
    assert {finding.code for finding in plan.warnings} <= {"QR207"}  # it is small
    converted = qrecipe.quantize(mlp, asking("eager"), example_inputs=rows)
    assert type(converted) is type(mlp)
    kernels = {type(module) for module in converted.modules()}
    assert nnq.dynamic.Linear in kernels
    traced = qrecipe.quantize(mlp, DYNAMIC, example_inputs=rows)
    assert torch.equal(converted(rows), traced(rows))


def test_the_argument_wins_over_the_recipe_and_the_recipe_stays_what_it_is(mlp, rows):
    loaded = asking("fx")
    compiled = qrecipe.compile(mlp, loaded, rows, executor="eager")
    assert compiled.plan.executor == "eager"
    assert compiled.plan.fingerprint == loaded.fingerprint
    assert qrecipe.plan(mlp, loaded, rows, executor=None).executor == "fx"
    quantized = qrecipe.quantize(mlp, loaded, example_inputs=rows, executor="eager")
    assert type(quantized) is type(mlp)


def test_what_was_quantized_by_request_loads_again(mlp, rows, tmp_path):
    for loaded, executor in ((asking("eager"), None), (recipe(base=DYNAMIC), "eager")):
        quantized = qrecipe.quantize(mlp, loaded, example_inputs=rows, executor=executor)
        qrecipe.save_quantized(quantized, tmp_path / "model.safetensors")
        restored = qrecipe.load_quantized(tmp_path / "model.safetensors", NETS["mlp"].model())
        assert torch.equal(restored(rows), quantized(rows))


_WITHOUT_A_TRACE = f'needs no trace: extends = "{DYNAMIC}"'


def test_a_static_recipe_that_needs_a_trace_is_told_of_a_dynamic_one_that_does_not(
    untraceable, tokens
):
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(untraceable, recipe(), tokens)
    assert _WITHOUT_A_TRACE in str(caught.value)
    assert any(site.mode == "dynamic" for site in qrecipe.plan(untraceable, DYNAMIC, tokens))


class Convolving(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ([nn.Conv1d(6, 6, 1), nn.Linear(6, 6)], ""),  # would leave most of it float
        ([nn.ReLU()], ""),
        ([nn.Linear(6, 6)], 'phase = "qat"'),
        ([nn.Linear(6, 6)], 'executor = "fx"'),
        ([nn.Linear(6, 6)], 'backend = "qnnpack"'),
    ],
)
def test_a_dynamic_recipe_is_not_proposed_where_it_does_little_or_is_not_asked_for(layers, head):
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(Convolving(*layers).eval(), recipe(head=head), torch.zeros(2, 6, 6))
    assert _WITHOUT_A_TRACE not in str(caught.value)


def test_fx_is_not_replaced_where_it_is_asked_for(untraceable, tokens):
    with pytest.raises(TraceError, match=r"if x.sum\(\) > 0:"):
        qrecipe.plan(untraceable, asking("fx"), tokens)
    with pytest.raises(TraceError):
        qrecipe.plan(untraceable, DYNAMIC, tokens, executor="fx")


@pytest.mark.parametrize(
    ("rules", "base", "message"),
    [
        ("", "builtin:x86-static", "no static quantization, and global is static"),
        ('[fx]\nroots = ["0"]', DYNAMIC, "traces no roots"),
        ('phase = "qat"', DYNAMIC, 'executor = "eager" does not train'),
        (
            '[rules.function]\n"torch.matmul" = "int8-dynamic"',
            DYNAMIC,
            'leaves functions float, and function "torch.matmul" quantizes them',
        ),
    ],
)
def test_eager_mode_says_what_it_cannot_do_and_where_that_is_asked(mlp, rows, rules, base, message):
    with pytest.raises(UnsupportedError, match="QR316") as raised:
        qrecipe.plan(mlp, asking("eager", rules, base), rows)
    (finding,) = raised.value.findings
    assert message in finding.message
    assert finding.location is not None
    assert finding.hint is not None


def test_static_rules_that_decide_nothing_do_not_keep_from_eager_mode(mlp, rows):
    static = '[rules.module_type]\n"torch.nn.Conv2d" = { weight = "weight", activation = "static" }'
    spec = '[tensor.static]\nobserver = "minmax"\ndtype = "uint8"\nqscheme = "per_tensor_affine"'
    assert qrecipe.plan(mlp, asking("eager", f"{spec}\n{static}"), rows).executor == "eager"


def test_a_bad_name_is_an_error_of_ours(mlp, rows):
    with pytest.raises(SchemaError, match=r'QR102(?s:.)*"eager"'):
        asking("eagr")
    for call in (qrecipe.plan, qrecipe.compile, qrecipe.quantize):
        with pytest.raises(UnsupportedError, match=r'QR317.*"eagr"(?s:.)*did you mean "eager"'):
            call(mlp, DYNAMIC, rows, executor="eagr")


def test_an_extending_recipe_overrides_the_executor_of_its_base(tmp_path):
    (tmp_path / "base.toml").write_text(asking("eager").to_toml())
    above = 'format = 1\nextends = "./base.toml"\n'
    (tmp_path / "same.toml").write_text(above)
    (tmp_path / "other.toml").write_text(f'{above}executor = "fx"\n')
    base, same, other = (
        qrecipe.load_recipe(tmp_path / f"{name}.toml") for name in ("base", "same", "other")
    )
    assert [each.executor for each in (base, same, other)] == ["eager", "eager", "fx"]
    assert base.fingerprint == same.fingerprint != other.fingerprint
    assert other.origin("executor").line == 3


def test_a_lock_does_not_fail_for_another_executor_alone(mlp, rows, tmp_path):
    path = tmp_path / "mlp.lock.toml"
    traced = qrecipe.plan(mlp, DYNAMIC, rows)
    write_lock(replace(traced, executor="eager"), path)
    (cause,) = check_lock(traced, path).causes
    assert str(cause) == "the plan: executor eager -> fx"
    less = qrecipe.plan(mlp, DYNAMIC, rows, executor="eager")
    write_lock(less, path)
    with pytest.raises(PlanError, match=r"Linear -> Linear\+relu(?s:.)*executor eager -> fx"):
        check_lock(traced, path)  # fused only in a graph
