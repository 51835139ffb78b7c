"""Bad models, tracing that fails, wrong phases: our own error that says how to mend it."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch
from failures import only, rows
from nets import NETS, Mlp, Residual
from plans import ROWS, net_of, recipe
from runs import STATIC, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.errors.findings import (
    ExecutionError,
    PlanError,
    QRecipeError,
    QRecipeWarning,
    TraceError,
    UnmatchedRuleError,
    UnsupportedError,
)

# --- models


def test_a_model_in_training_mode_warns_and_is_quantized_as_in_eval_mode():
    net = NETS["residual"]
    model, batches = net.model().train(), net.batches()
    with pytest.warns(QRecipeWarning, match="^QR202"):
        converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert all(module.training for module in model.modules())
    expected = qrecipe.quantize(net.model(), STATIC, batches, progress=silent)
    assert torch.equal(converted(batches[0]), expected(batches[0]))


def test_the_training_mode_warning_can_be_accepted():
    qrecipe.plan(Mlp().train(), recipe('[lint]\nignore = ["QR202"]\n'), ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_not_float32_is_refused_with_a_name_and_the_way_out(dtype):
    model = Residual().eval().to(dtype)
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(model, STATIC, torch.zeros(1, 3, 8, 8, dtype=dtype))
    finding = only(caught, "QR306")
    assert "conv1.weight" in finding.message
    assert str(dtype).removeprefix("torch.") in finding.message
    assert "float()" in finding.hint


def test_a_single_buffer_in_half_precision_is_found():
    model = Mlp().eval()
    model.register_buffer("table", torch.zeros(3).half())
    with pytest.raises(PlanError, match="table is float16"):
        qrecipe.plan(model, STATIC, ROWS)


def test_a_model_that_is_already_quantized_gets_our_error_or_passes():
    net = NETS["mlp"]
    converted = qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    with pytest.raises(QRecipeError):
        qrecipe.quantize(converted, STATIC, net.batches(), progress=silent)


def test_something_that_is_no_model_is_refused():
    for model in (lambda x: x, None, Mlp):
        with pytest.raises(QRecipeError):
            qrecipe.plan(model, STATIC, ROWS)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Mlp().eval()
    with pytest.raises(PlanError, match="meta"):
        qrecipe.plan(model, STATIC, ROWS)


def test_a_model_that_cannot_be_copied_is_refused():
    model = Mlp().eval()
    model.lock = (x for x in ())
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(model, STATIC, ROWS)
    assert "copied" in only(caught, "QR306").message


# --- tracing


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x)
        return x


def _loops(self, x):
    for _ in range(x.shape[0]):
        x = x + 1
    return x


UNTRACEABLE = {
    "control_flow": lambda self, x: x + 1 if x.sum() > 0 else x,
    "comparison": lambda self, x: x + int(x.shape[0] == 2),
    "length": lambda self, x: x[: len(x)],
    "range": _loops,
    "item": lambda self, x: x * float(x.max()),
    "numpy": lambda self, x: torch.from_numpy(x.numpy()),
    "star": lambda self, x: torch.stack([*x]),
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_a_forward_that_cannot_be_traced_names_the_submodule_the_line_and_the_key(kind):
    inner = net_of(UNTRACEABLE[kind])
    model = net_of(
        lambda self, x: self.head(self.body(x)),
        body=nn.Sequential(nn.ReLU(), inner),
        head=nn.Linear(6, 2),
    )
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(model, STATIC, ROWS)
    finding = only(caught, "QR305")
    assert '"body.1"' in finding.message
    assert re.search(r"test_bad_models\.py:\d+", finding.message)
    assert '[fx] non_traceable_module_name = ["body.1"]' in finding.hint
    assert "\n" not in finding.message


@pytest.mark.filterwarnings("ignore:QR232:qrecipe.QRecipeWarning")
def test_the_key_that_the_message_names_mends_it():
    model = net_of(lambda self, x: self.head(self.router(x)), router=Router(), head=nn.Linear(6, 2))
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(model, STATIC, ROWS)
    key = caught.value.findings[0].hint.partition("[fx] ")[2]
    mended = recipe(f"[fx]\n{key}\n")
    plan = qrecipe.plan(model, mended, ROWS)
    assert {site.name: site.verdict for site in plan.sites} == {
        "router": "float",
        "head": "quantized",
    }
    batches = rows()
    converted = qrecipe.quantize(model, mended, batches, progress=silent)
    assert converted(batches[0]).shape == (4, 2)


def test_the_roots_own_forward_that_cannot_be_traced_suggests_roots():
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(Router().eval(), STATIC, ROWS)
    finding = only(caught, "QR305")
    assert "the model's own forward" in finding.message
    assert "if x.sum() > 0" in finding.message
    assert "roots" in finding.hint


@pytest.mark.parametrize("key", ["non_traceable_module_name", "non_traceable_module_class"])
def test_a_non_traceable_name_that_the_model_lacks_is_an_error_with_the_nearest(key):
    known = "router" if key.endswith("name") else f"{Router.__module__}.Router"
    model = net_of(lambda self, x: self.router(x), router=Router())
    with pytest.raises(UnmatchedRuleError) as caught:
        qrecipe.plan(model, recipe(f'[fx]\n{key} = ["{known}r", "{known}z"]\n'), ROWS)
    assert len(caught.value.findings) == 2
    assert all(known in finding.hint for finding in caught.value.findings)


def test_a_preserved_attribute_that_the_model_lacks_is_an_error_with_the_nearest():
    model = Mlp().eval()
    model.class_names = ["a"]
    with pytest.raises(PlanError) as caught:
        qrecipe.compile(model, recipe('[fx]\npreserved_attributes = ["class_name"]\n'), ROWS)
    assert "class_names" in caught.value.findings[0].hint
    with pytest.raises(PlanError) as caught:
        qrecipe.compile(model, recipe('[fx]\npreserved_attributes = ["training"]\n'), ROWS)
    assert caught.value.findings[0].hint is None


CHANGES_THAT_TRACING_LOSES = {
    "view": lambda self, x: self._then(x, lambda y: y.view(-1).add_(5)),
    "slice": lambda self, x: self._then(x, lambda y: y[:, 0].mul_(0)),
    "chain": lambda self, x: self._then(x, lambda y: y.clamp_(min=0).view(-1)),
    "second_name": lambda self, x: self._then(x, lambda y: y.__iadd__(1)),
}


@pytest.mark.parametrize("kind", CHANGES_THAT_TRACING_LOSES)
def test_a_change_that_tracing_could_lose_is_kept_or_refused_and_never_lost(kind):
    def then(self, x, change):
        y = self.fc(x)
        change(y)
        return y

    model = net_of(CHANGES_THAT_TRACING_LOSES[kind], fc=nn.Linear(6, 6))
    type(model)._then = then
    batches = rows()
    try:
        converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    except PlanError as error:
        assert "computes something else" in str(error)  # noqa: PT017
    else:
        expected = model(batches[0])
        assert float((converted(batches[0]) - expected).norm() / expected.norm()) < 0.1


def test_a_buffer_that_forward_replaces_is_our_error_or_right():
    def forward(self, x):
        self.mean += x.mean(0)
        return self.fc(x)

    model = net_of(forward, fc=nn.Linear(6, 6))
    model.register_buffer("mean", torch.zeros(6))
    with contextlib.suppress(QRecipeError):
        qrecipe.plan(model, STATIC, ROWS)
    assert torch.equal(model.mean, torch.zeros(6))


def test_an_operand_that_is_no_floating_tensor_is_no_reason_to_fail():
    net = NETS["tagger"]
    converted = qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    tokens = net.batches(1)[0]
    expected, actual = net.model()(tokens), converted(tokens)
    assert float((actual - expected).norm() / expected.norm()) < 0.1


# --- phases and backends


def test_the_qat_phase_to_quantize_shows_the_lines_to_write():
    qat = recipe('phase = "qat"\n')
    with pytest.raises(PlanError) as caught:
        qrecipe.quantize(Mlp().eval(), qat, rows(), progress=silent)
    finding = only(caught, "QR308")
    text = "\n".join(finding.notes)
    for call in ("qrecipe.compile(", ".prepare()", ".convert(prepared)"):
        assert call in text


def test_an_engine_that_this_torch_lacks_is_our_error(monkeypatch):
    monkeypatch.setattr("qrecipe.execution.engine.ENGINES", ("x86", "imaginary"))
    from qrecipe.execution.engine import engine

    before = torch.backends.quantized.engine
    with pytest.raises(UnsupportedError) as caught, engine("imaginary"):
        pytest.fail("must not run")
    assert "x86" in str(caught.value)
    assert torch.backends.quantized.engine == before


def test_a_missing_engine_is_found_before_any_batch_is_taken(monkeypatch):
    monkeypatch.setattr(
        type(torch.backends.quantized),
        "supported_engines",
        property(lambda self: ["none", "onednn"]),
    )
    taken = []

    def batches():
        for batch in rows():
            taken.append(batch)
            yield batch

    for run in (
        lambda: qrecipe.quantize(Mlp().eval(), STATIC, batches(), progress=silent),
        lambda: qrecipe.compile(Mlp().eval(), STATIC, ROWS),
    ):
        with pytest.raises(UnsupportedError, match="QR309 this torch has no engine x86"):
            run()
    assert len(taken) <= 1
    assert qrecipe.plan(Mlp().eval(), STATIC, ROWS).sites


@pytest.mark.filterwarnings("ignore:QR232:qrecipe.QRecipeWarning")
def test_quantize_leaves_the_engine_of_the_process_as_it_was():
    before = torch.backends.quantized.engine
    other = "qnnpack" if before != "qnnpack" else "fbgemm"
    for backend in ("x86", "fbgemm", "qnnpack"):
        torch.backends.quantized.engine = other
        try:
            base = "builtin:arm-static" if backend == "qnnpack" else "builtin:x86-static"
            chosen = recipe(f'backend = "{backend}"', base=base)
            qrecipe.quantize(Mlp().eval(), chosen, rows(), progress=silent)
            assert torch.backends.quantized.engine == other
        finally:
            torch.backends.quantized.engine = before


def test_a_submodule_with_the_name_of_a_keyword_or_a_method_is_told_to_be_renamed():
    model = nn.Sequential()
    model.add_module("class", nn.Linear(6, 6))
    with pytest.raises(TraceError, match="QR305 class contains a Python keyword"):
        qrecipe.plan(model.eval(), STATIC, ROWS)
    model = net_of(lambda self, x: self.fc(x), fc=nn.Linear(6, 6), half=nn.Linear(6, 6))
    with pytest.raises(
        PlanError, match=r"QR306 the submodule half has the name of a torch\.nn\.Module method"
    ):
        qrecipe.plan(model, STATIC, ROWS)


@pytest.mark.parametrize(
    "name", every(2, ["$\\frac$", "a\\n", "ends\\", 'q"uote', "a\0b", "a\nb", "ﬁ", 'a" "b'])
)
def test_a_name_that_no_code_can_spell_is_named_at_plan_time(name):
    model = nn.Sequential()
    model.add_module(name, nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    with pytest.raises(
        TraceError, match="cannot be written in the Python code of a graph"
    ) as caught:
        qrecipe.plan(model.eval(), STATIC, ROWS)
    (finding,) = caught.value.findings
    assert finding.code == "QR305"
    assert json.loads(finding.message.partition(" cannot be")[0]) == f"{name}.0"
    assert finding.hint == "rename it"
    plan = qrecipe.plan(model, "builtin:x86-dynamic", ROWS)  # no code is made of it
    assert plan.executor == "eager"


@pytest.mark.parametrize("name", every(2, ["a b", "x-1[0]", "it's", "%s", "{x}", "9", "é"]))
def test_odd_names_that_code_can_spell_are_no_hindrance(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(6, 6))
    batches = [torch.rand(2, 6) for _ in range(10)]
    assert qrecipe.quantize(model.eval(), STATIC, batches, progress=silent)(ROWS).shape == (2, 6)


def test_the_engine_is_restored_after_an_error():
    from qrecipe.execution.engine import engine

    before = torch.backends.quantized.engine
    with contextlib.suppress(ZeroDivisionError), engine("fbgemm"):
        assert torch.backends.quantized.engine == "fbgemm"
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == before


def test_a_failure_inside_torchs_conversion_is_our_error(monkeypatch):
    def explode(*args, **kwargs):
        raise AssertionError("deep inside\nwith a second line")

    monkeypatch.setattr("qrecipe.execution.fx.convert.convert", explode)
    with pytest.raises(ExecutionError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, rows(), progress=silent)
    finding = only(caught, "QR405")
    assert "deep inside" in finding.message
    assert "float" in finding.hint


def test_a_quantized_model_leaves_the_random_state_of_the_caller_alone():
    model, batches = Mlp().eval(), rows()
    state = torch.get_rng_state()
    qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_on_another_device_is_named_by_its_first_parameter_there():
    model = net_of(lambda self, x: self.b(self.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.to("meta")
    for call in (
        lambda: qrecipe.plan(model, STATIC, ROWS),
        lambda: qrecipe.quantize(model, STATIC, rows(), progress=silent),
    ):
        with pytest.raises(PlanError) as caught:
            call()
        finding = only(caught, "QR306")
        assert finding.message.startswith("b.weight is on meta")
        assert "cpu" in finding.hint
