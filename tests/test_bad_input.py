"""Bad models and bad data get our own error, and leave everything as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from nets import NETS, Keywords, Mlp, Residual
from torch import nn
from torch.ao.quantization.observer import ObserverBase

import qrecipe
from qrecipe.errors import (
    CODES,
    CalibrationError,
    ExecutionError,
    PlanError,
    QRecipeError,
    QRecipeWarning,
    TraceError,
    UnmatchedRuleError,
    UnsupportedError,
)

HEAD = 'format = 1\nextends = "builtin:x86-static"\n'
STATIC = qrecipe.parse_recipe(HEAD)
ROWS = torch.zeros(2, 6)


def silent(done, total):
    """A progress callback that shows nothing."""


def recipe(text=""):
    return qrecipe.parse_recipe(HEAD + text)


def net_of(forward, **modules):
    net = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(net, name, module)
    return net.eval()


def rows(count=10, width=6):
    return [torch.randn(4, width) for _ in range(count)]


def observers(prepared):
    """All that the observers of a prepared model know."""
    return {
        name: {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in [*module.state_dict().items(), *vars(module).items()]
            if not key.startswith("_")
        }
        for name, module in prepared.named_modules()
        if isinstance(module, ObserverBase)
    }


def assert_equal_observers(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            other = two[name][key]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, f"{name}.{key}"


def only(error, code):
    (finding,) = error.value.findings
    assert finding.code == code
    assert CODES[code].error is not None
    assert isinstance(error.value, CODES[code].error)
    return finding


def prepared_mlp(text=""):
    compiled = qrecipe.compile(Mlp().eval(), recipe(text), ROWS)
    return compiled, compiled.prepare()


# --- batches

BAD_BATCHES = {
    "wrong_shape": (lambda: torch.randn(4, 7), "QR402"),
    "wrong_rank": (lambda: torch.randn(6).reshape(6, 1, 1)[:0], "QR402"),
    "wrong_dtype": (lambda: torch.randint(0, 5, (4, 6)), "QR402"),
    "half": (lambda: torch.randn(4, 6).half(), "QR402"),
    "double": (lambda: torch.randn(4, 6).double(), "QR402"),
    "nan": (lambda: torch.full((4, 6), float("nan")), "QR403"),
    "one_nan": (lambda: torch.eye(4, 6).masked_fill(torch.eye(4, 6) > 0, float("nan")), "QR403"),
    "inf": (lambda: torch.full((4, 6), float("inf")), "QR403"),
    "both_infinities": (lambda: torch.tensor([[float("inf"), -float("inf")] * 3]), "QR403"),
    "labels": (lambda: (torch.randn(4, 6), torch.randint(0, 3, (4,))), "QR402"),
    "labels_in_a_list": (lambda: [torch.randn(4, 6), torch.randint(0, 3, (4,))], "QR402"),
    "wrong_keyword": (lambda: {"image": torch.randn(4, 6)}, "QR402"),
    "none": (lambda: None, "QR402"),
    "text": (lambda: "a batch", "QR402"),
    "nothing": (lambda: (), "QR402"),
    "empty_dict": (dict, "QR402"),
    "an_object": (lambda: object(), "QR402"),
}


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_a_bad_batch_is_named_by_its_index_and_leaves_the_observers_as_they_were(kind, index):
    make, code = BAD_BATCHES[kind]
    compiled, prepared = prepared_mlp()
    qrecipe.calibrate(prepared, rows(), progress=silent)
    before = observers(prepared)
    batches = rows()
    batches[index] = make()
    with pytest.raises(CalibrationError) as caught:
        qrecipe.calibrate(prepared, batches, progress=silent)
    assert f"batch {index}" in only(caught, code).message
    assert_equal_observers(before, observers(prepared))
    assert compiled.convert(prepared) is not None


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_quantize_with_a_bad_first_batch_raises_the_same_error_and_keeps_the_model(kind):
    make, code = BAD_BATCHES[kind]
    model = Mlp().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(model, STATIC, [make(), *rows()], progress=silent)
    assert "batch 0" in only(caught, code).message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training


def test_a_histogram_observer_is_restored_too():
    compiled = qrecipe.compile(Mlp().eval(), "builtin:x86-static-histogram", ROWS)
    prepared = compiled.prepare()
    before = observers(prepared)
    with pytest.raises(CalibrationError):
        qrecipe.calibrate(prepared, [*rows(), torch.randn(4, 7)], progress=silent)
    assert_equal_observers(before, observers(prepared))
    qrecipe.calibrate(prepared, rows(), progress=silent)
    middle = observers(prepared)
    with pytest.raises(CalibrationError):
        qrecipe.calibrate(prepared, [torch.randn(4, 6) * 100, None], progress=silent)
    assert_equal_observers(middle, observers(prepared))


def test_a_failed_first_calibration_does_not_count_as_one():
    compiled, prepared = prepared_mlp()
    with pytest.raises(CalibrationError):
        qrecipe.calibrate(prepared, [*rows(3), torch.randn(4, 7)], progress=silent)
    with pytest.raises(CalibrationError) as caught:
        compiled.convert(prepared)
    assert "never calibrated" in only(caught, "QR401").message


def test_a_failed_second_calibration_keeps_the_sample_of_the_first():
    compiled, prepared = prepared_mlp()
    qrecipe.calibrate(prepared, rows(), progress=silent)
    kept = prepared.meta["qrecipe_sample"]
    with pytest.raises(CalibrationError):
        qrecipe.calibrate(prepared, [torch.randn(4, 7)], progress=silent)
    assert prepared.meta["qrecipe_sample"] is kept
    compiled.convert(prepared)


def test_a_message_about_a_batch_describes_it():
    _, prepared = prepared_mlp()
    with pytest.raises(CalibrationError) as caught:
        qrecipe.calibrate(prepared, [torch.randn(4, 7)], progress=silent)
    message = only(caught, "QR402").message
    assert "float32 [4, 7]" in message
    assert "\n" not in message


def test_a_loader_of_inputs_and_labels_is_shown_the_forward_to_write():
    batches = [(x, torch.zeros(4)) for x in rows()]
    _, prepared = prepared_mlp()
    for run in (
        lambda: qrecipe.calibrate(prepared, batches, progress=silent),
        lambda: qrecipe.quantize(Mlp().eval(), STATIC, batches, progress=silent),
    ):
        with pytest.raises(CalibrationError) as caught:
            run()
        assert "forward=lambda model, batch: model(batch[0])" in only(caught, "QR402").hint


def test_the_forward_that_the_hint_shows_works():
    batches = [(x, torch.zeros(4)) for x in rows()]
    model = Mlp().eval()
    converted = qrecipe.quantize(
        model, STATIC, batches, forward=lambda model, batch: model(batch[0]), progress=silent
    )
    plain = qrecipe.quantize(model, STATIC, [x for x, _ in batches], progress=silent)
    assert torch.equal(converted(batches[0][0]), plain(batches[0][0]))


def test_a_forward_that_fails_or_never_calls_the_model_is_named():
    def broken(model, batch):
        raise KeyError("image")

    for forward in (broken, lambda model, batch: None):
        with pytest.raises(CalibrationError) as caught:
            qrecipe.quantize(Mlp().eval(), STATIC, rows(), forward=forward, progress=silent)
        only(caught, "QR402")
    compiled, prepared = prepared_mlp()
    with pytest.raises(CalibrationError):
        qrecipe.calibrate(prepared, rows(), lambda model, batch: None, progress=silent)
    with pytest.raises(CalibrationError):
        compiled.convert(prepared)


def test_a_forward_that_catches_exceptions_still_gives_its_inputs():
    def stubborn(model, batch):
        try:
            return model(batch)
        except Exception:
            return None

    batches = rows()
    converted = qrecipe.quantize(Mlp().eval(), STATIC, batches, forward=stubborn, progress=silent)
    assert converted(batches[0]).shape == (4, 4)


def test_batches_of_keywords_and_of_positions_give_the_same():
    batches = NETS["keywords"].batches()
    model = NETS["keywords"].model()
    assert isinstance(model, Keywords)
    by_keyword = qrecipe.quantize(model, STATIC, batches, progress=silent)
    as_tuples = [(batch["first"], batch["second"]) for batch in batches]
    by_position = qrecipe.quantize(model, STATIC, as_tuples, progress=silent)
    assert torch.equal(by_keyword(*as_tuples[0])[0], by_position(*as_tuples[0])[0])


@pytest.mark.parametrize("batches", [torch.randn(4, 6), {"x": torch.randn(4, 6)}, 3, None])
def test_something_that_is_no_iterable_of_batches_is_refused(batches):
    _, prepared = prepared_mlp()
    with pytest.raises(CalibrationError) as caught:
        qrecipe.calibrate(prepared, batches, progress=silent)
    only(caught, "QR401")
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, batches, progress=silent)
    only(caught, "QR401")


@pytest.mark.parametrize("batches", [[], (), iter(()), (x for x in ())])
def test_no_batches_are_an_error(batches):
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, batches, progress=silent)
    only(caught, "QR401")


def test_no_batches_at_all_are_an_error_for_static_sites():
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC)
    only(caught, "QR401")
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, example_inputs=ROWS)
    only(caught, "QR401")


def test_too_few_batches_are_an_error_and_fewer_than_ten_a_warning():
    _, prepared = prepared_mlp("[calibration]\nmin_batches = 12\n")
    with pytest.raises(CalibrationError) as caught:
        qrecipe.calibrate(prepared, rows(11), progress=silent)
    finding = only(caught, "QR401")
    assert "11" in finding.message
    assert "12" in finding.message
    _, prepared = prepared_mlp()
    with pytest.warns(QRecipeWarning, match=r"^QR201.*9 batches"):
        qrecipe.calibrate(prepared, rows(9), progress=silent)
    _, prepared = prepared_mlp('[lint]\nignore = ["QR201"]\n')
    qrecipe.calibrate(prepared, rows(1), progress=silent)


def test_no_more_than_max_batches_are_taken_from_a_loader():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield torch.randn(4, 6)

    shown = []
    qrecipe.quantize(
        Mlp().eval(),
        recipe("[calibration]\nmax_batches = 12\n"),
        endless(),
        progress=lambda done, total: shown.append((done, total)),
    )
    assert len(taken) == 12
    assert [done for done, _ in shown] == list(range(1, 13))


def test_a_list_shows_its_length_as_progress():
    shown = []
    qrecipe.quantize(
        Mlp().eval(), STATIC, rows(11), progress=lambda done, total: shown.append((done, total))
    )
    assert shown[-1] == (11, 11)


@pytest.mark.parametrize("at", [0, 4])
def test_a_generator_that_raises_is_named_by_the_batch(at):
    def failing():
        for index in range(12):
            if index == at:
                raise OSError("disk gone")
            yield torch.randn(4, 6)

    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, failing(), progress=silent)
    finding = only(caught, "QR402")
    assert f"batch {at}" in finding.message
    assert "disk gone" in finding.message
    assert isinstance(caught.value.__cause__, OSError)


def test_a_loader_whose_iterator_cannot_be_made_is_our_error_too():
    class Broken:
        def __iter__(self):
            raise RuntimeError("no workers")

    with pytest.raises(CalibrationError, match="no workers"):
        qrecipe.quantize(Mlp().eval(), STATIC, Broken(), progress=silent)


def test_an_interrupt_passes_through_and_leaves_the_observers_as_they_were():
    _, prepared = prepared_mlp()
    before = observers(prepared)

    def interrupted():
        yield torch.randn(4, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qrecipe.calibrate(prepared, interrupted(), progress=silent)
    assert_equal_observers(before, observers(prepared))


def test_a_nan_that_the_model_itself_makes_is_found_by_the_site():
    model = net_of(lambda self, x: self.b(self.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    with torch.no_grad():
        model.a.weight[0, 0] = float("nan")
    with pytest.raises(QRecipeError) as caught:
        qrecipe.quantize(model, STATIC, rows(), progress=silent)
    assert "a" in str(caught.value)


def test_calibrating_a_model_that_is_not_ours_is_refused():
    for model in (Mlp().eval(), torch.fx.symbolic_trace(Mlp())):
        with pytest.raises(QRecipeError) as caught:
            qrecipe.calibrate(model, rows(), progress=silent)
        assert "prepare" in str(caught.value)


def test_converting_without_calibration_is_an_error():
    compiled, prepared = prepared_mlp()
    with pytest.raises(CalibrationError) as caught:
        compiled.convert(prepared)
    assert "calibrate" in only(caught, "QR401").hint


def test_converting_another_models_preparation_is_our_error():
    compiled, _ = prepared_mlp()
    for other in (Mlp().eval(), torch.fx.symbolic_trace(Mlp().eval())):
        with pytest.raises(QRecipeError):
            compiled.convert(other)
    elsewhere = qrecipe.compile(NETS["nested"].model(), STATIC, ROWS).prepare()
    qrecipe.calibrate(elsewhere, rows(), progress=silent)
    with pytest.raises(QRecipeError):
        compiled.convert(elsewhere)


# --- example inputs

GARBAGE = ["garbage", 3, None, object(), torch.randn(2, 7), (), {}, (ROWS, ROWS), {"y": ROWS}]


@pytest.mark.parametrize(
    "inputs", GARBAGE, ids=[type(g).__name__ + str(i) for i, g in enumerate(GARBAGE)]
)
@pytest.mark.parametrize("call", [qrecipe.plan, qrecipe.compile])
def test_example_inputs_that_do_not_fit_are_an_error_that_says_why(call, inputs):
    with pytest.raises(PlanError) as caught:
        call(Mlp().eval(), STATIC, inputs)
    assert only(caught, "QR307").hint


def test_quantize_without_batches_checks_the_example_inputs():
    rules = '[tensor.d]\ndtype = "uint8"\nis_dynamic = true\n[qconfig.d]\nweight = "weight"\n'
    dynamic = recipe(f'{rules}activation = "d"\n[rules]\nglobal = "d"\n')
    with pytest.raises(PlanError):
        qrecipe.quantize(Mlp().eval(), dynamic, example_inputs="garbage")


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
    "assertion": lambda self, x: [x for _ in [0] if bool(x.shape[0] == 2)][0],
    "length": lambda self, x: x[: len(x)],
    "range": _loops,
    "item": lambda self, x: x * float(x.max()),
    "numpy": lambda self, x: torch.from_numpy(x.numpy()),
    "star": lambda self, x: torch.cat([*x]),
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
    assert re.search(r"test_bad_input\.py:\d+", finding.message)
    assert '[fx] non_traceable_module_name = ["body.1"]' in finding.hint
    assert "\n" not in finding.message


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
    try:
        qrecipe.plan(model, STATIC, ROWS)
    except QRecipeError:
        pass
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


@pytest.mark.parametrize("backend", ["tensorrt", "executorch"])
def test_a_backend_without_kernels_plans_or_refuses_and_never_executes(backend):
    text = f"""
    backend = "{backend}"
    [tensor.weight]
    quant_min = -127
    quant_max = 127
    eps = 0.0002441406251
    [tensor.activation]
    dtype = "int8"
    qscheme = "per_tensor_symmetric"
    reduce_range = false
    quant_min = -128
    quant_max = 127
    eps = 0.0002441406251
    """
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.quantize(Mlp().eval(), recipe(text), rows(), progress=silent)
    assert {finding.code for finding in caught.value.findings} == {"QR309"}


def test_an_engine_that_this_torch_lacks_is_our_error(monkeypatch):
    monkeypatch.setattr("qrecipe.fx.execution.ENGINES", ("x86", "imaginary"))
    from qrecipe.fx.execution import engine

    before = torch.backends.quantized.engine
    with pytest.raises(UnsupportedError) as caught, engine("imaginary"):
        pytest.fail("must not run")
    assert "x86" in str(caught.value)
    assert torch.backends.quantized.engine == before


def test_the_engine_is_restored_after_an_error():
    from qrecipe.fx.execution import engine

    before = torch.backends.quantized.engine
    with pytest.raises(ZeroDivisionError), engine("fbgemm"):
        assert torch.backends.quantized.engine == "fbgemm"
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == before


def test_a_failure_inside_torchs_conversion_is_our_error(monkeypatch):
    def explode(*args, **kwargs):
        raise AssertionError("deep inside\nwith a second line")

    monkeypatch.setattr("qrecipe.fx.execution.convert", explode)
    with pytest.raises(ExecutionError) as caught:
        qrecipe.quantize(Mlp().eval(), STATIC, rows(), progress=silent)
    assert "deep inside" in only(caught, "QR405").message


def test_a_quantized_model_leaves_the_random_state_of_the_caller_alone():
    model, batches = Mlp().eval(), rows()
    state = torch.get_rng_state()
    qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert torch.equal(torch.get_rng_state(), state)
