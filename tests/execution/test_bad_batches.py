"""Bad data get our own error, and leave observers and model as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from failures import assert_equal_observers, observers, only, prepared_mlp, rows
from nets import NETS, Keywords, Mlp
from plans import ROWS, net_of, recipe
from runs import STATIC, silent
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qrecipe
from qrecipe.errors.findings import CalibrationError, PlanError, QRecipeWarning
from qrecipe.execution.prepared import prepared_state

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


@pytest.mark.parametrize("index", [3, pytest.param(0, marks=pytest.mark.slow)])
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
    kept = dict(prepared_state(prepared).samples)
    with pytest.raises(CalibrationError):
        qrecipe.calibrate(prepared, [torch.randn(4, 7)], progress=silent)
    assert prepared_state(prepared).samples[""] is kept[""]
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
    converted = qrecipe.quantize(Mlp().eval(), STATIC, rows(), progress=silent)
    for run in (
        lambda: qrecipe.calibrate(prepared, batches, progress=silent),
        lambda: qrecipe.quantize(Mlp().eval(), STATIC, batches, progress=silent),
        lambda: qrecipe.drift(converted, batches, progress=silent),
    ):
        with pytest.raises(CalibrationError) as caught:
            run()
        found = only(caught, "QR402")
        assert "forward=lambda model, batch: model(batch[0])" in found.hint
        assert "QR307" not in found.message


def test_labels_that_a_model_takes_for_a_second_input_are_explained_wherever_batches_are_read():
    model = net_of(lambda self, x, mask=1.0: self.fc(x) * mask, fc=nn.Linear(6, 3))
    loader = DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8)), batch_size=4)
    converted = qrecipe.quantize(model, STATIC, rows(), progress=silent)
    for run in (
        lambda: qrecipe.quantize(model, STATIC, loader, progress=silent),
        lambda: qrecipe.sensitivity(model, STATIC, loader, progress=silent),
        lambda: qrecipe.compare(model, converted, loader, progress=silent),
        lambda: qrecipe.tune(model, STATIC, loader, lambda _: 1.0, progress=silent),
        lambda: qrecipe.drift(converted, loader, progress=silent),
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
        qrecipe.calibrate(prepared, rows(), forward=lambda model, batch: None, progress=silent)
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
    assert shown == [*((done, None) for done in range(1, 13)), (12, 12)]


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


class Stream:
    """A loader that raises whatever it likes when it is asked for its length."""

    def __init__(self, error):
        self._error = error

    def __len__(self):
        raise self._error

    def __iter__(self):
        return iter(rows(10))


@pytest.mark.parametrize(
    "error", [NotImplementedError("no length"), RuntimeError("not yet"), TypeError("none")]
)
def test_a_loader_that_cannot_tell_its_length_is_read_all_the_same(error):
    model, seen = Mlp().eval(), []
    converted = qrecipe.quantize(
        model, STATIC, Stream(error), progress=lambda done, total: seen.append(total)
    )
    assert seen == [*[None] * 10, 10]
    qrecipe.sensitivity(model, STATIC, Stream(error), progress=silent)
    qrecipe.compare(model, converted, Stream(error), progress=silent)
    qrecipe.drift(converted, Stream(error), progress=silent)


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
        model.a.weight.fill_(3e38)  # finite, and what it gives is not
    with pytest.raises(CalibrationError) as caught:
        qrecipe.quantize(model, STATIC, rows(), progress=silent)
    assert [finding.code for finding in caught.value.findings] == ["QR404", "QR404"]
    found = [finding.message for finding in caught.value.findings]
    assert found[0].startswith("the observer of a saw no finite value")
    assert found[1].startswith("the observer of b saw no finite value")


@pytest.mark.parametrize("measure", [qrecipe.quantize, qrecipe.sensitivity])
def test_what_is_observed_is_named_as_the_plan_names_it_and_not_by_a_node(measure):
    def forward(self, input):
        return self.c(self.b(torch.relu(self.a(input))).abs() / torch.zeros(()))

    model = net_of(forward, **{name: nn.Linear(6, 6) for name in "abc"})
    with torch.no_grad():
        model.a.weight.fill_(3e38)
    with pytest.raises(CalibrationError) as caught:
        measure(model, STATIC, rows(), progress=silent)
    observed = [finding.message.split(" saw ")[0] for finding in caught.value.findings]
    inputs = {f"the observer of the input of {name}" for name in "bc"}
    assert set(observed) <= {f"the observer of {name}" for name in "abc"} | inputs
    assert "the observer of the input of c" in observed


def test_calibrating_a_model_that_is_not_ours_is_refused():
    for model in (Mlp().eval(), torch.fx.symbolic_trace(Mlp())):
        with pytest.raises(CalibrationError) as caught:
            qrecipe.calibrate(model, rows(), progress=silent)
        assert "CompiledRecipe.prepare()" in only(caught, "QR406").hint


def test_converting_without_calibration_is_an_error():
    compiled, prepared = prepared_mlp()
    with pytest.raises(CalibrationError) as caught:
        compiled.convert(prepared)
    assert "calibrate" in only(caught, "QR401").hint


def test_converting_another_models_preparation_is_our_error():
    compiled, _ = prepared_mlp()
    for other in (Mlp().eval(), torch.fx.symbolic_trace(Mlp().eval())):
        with pytest.raises(CalibrationError) as caught:
            compiled.convert(other)
        assert "not prepared by qrecipe" in only(caught, "QR406").message
    elsewhere = qrecipe.compile(NETS["nested"].model(), STATIC, ROWS).prepare()
    qrecipe.calibrate(elsewhere, rows(), progress=silent)
    with pytest.raises(CalibrationError) as caught:
        compiled.convert(elsewhere)
    assert "another CompiledRecipe" in only(caught, "QR406").message


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
