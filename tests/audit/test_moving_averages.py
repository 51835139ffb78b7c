"""Moving averages that cling to the first batches: what is said of them, and when nothing is."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from plans import recipe
from runs import STATIC, silent
from torch import nn

import qrecipe
from qrecipe._torch_ao import MinMaxObserver
from qrecipe.audit.farthest_call import Candidates, outside
from qrecipe.audit.ranges import static_observers
from qrecipe.audit.rounding import code_range, rounded_db, side_by_side_db
from qrecipe.audit.sample import Sample
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import QRecipeWarning
from qrecipe.execution.prepared import prepared_state
from qrecipe.model.call import Inputs
from qrecipe.registry import table as registered


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def batches(*scales):
    return [(torch.rand(16, 8) * 2 - 1) * scale for scale in scales]


def quantized(scales, a_recipe=STATIC):
    return qrecipe.quantize(model(), a_recipe, batches(*scales), progress=silent)


def test_a_quiet_first_batch_before_loud_ones_is_warned_about_with_the_ranges():
    with pytest.warns(QRecipeWarning, match="^QR232") as caught:
        converted = quantized([1, *[10] * 10], recipe(head='[lint]\nignore = ["QR203"]'))
    text = str(caught[0].message)
    assert (
        "the moving averages depend too much on the first of 11 batches, which weighs 90%" in text
    )
    assert re.search(r"0 is clipped by 6\d% \(keeping 0 to \d\.\d+ of 0 to 1\d\.\d\)", text)
    assert re.search(r"has \d+\.\d dB on the first batch and -?\d\.\d dB on batch \d", text)
    assert re.search(r'with "minmax" \d\d\.\d and \d\d\.\d dB', text)
    x = batches(10)[0]
    assert sqnr_db(model()(x), converted(x)) < 10


def test_a_first_batch_of_zeros_is_warned_about():
    with pytest.warns(QRecipeWarning, match="^QR232"):
        quantized([0, *[1] * 10], recipe(head='[lint]\nignore = ["QR203"]'))


@pytest.mark.parametrize("mended", ["larger constant", "minmax", "shuffled"])
def test_each_of_the_ways_out_that_the_warning_names_works(mended):
    observers = {
        "larger constant": '{ name = "moving_average_minmax", averaging_constant = 0.5 }',
        "minmax": '"minmax"',
        "shuffled": '"moving_average_minmax"',
    }
    scales = [10] * 5 + [1] + [10] * 5 if mended == "shuffled" else [1, *[10] * 10]
    mend = recipe(f"[tensor.activation]\nobserver = {observers[mended]}")
    converted, texts = said(batches(*scales), mend)
    assert [text[:5] for text in texts] == (["QR234"] if mended == "shuffled" else [])
    x = batches(10)[0]
    assert sqnr_db(model()(x), converted(x)) > 20


def test_one_loud_batch_among_quiet_ones_is_what_an_average_is_for():
    _, (text,) = said(batches(*[1] * 6, 100, *[1] * 6))
    assert text.startswith("QR234")


def test_a_second_calibration_starts_from_the_average_of_the_first():
    compiled = qrecipe.compile(model(), STATIC, batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches(*[1] * 10), progress=silent)
    with pytest.warns(QRecipeWarning, match="^QR232") as caught:
        qrecipe.calibrate(prepared, batches(*[10] * 10), progress=silent)
    assert re.search(r"dB on batch [1-9],", str(caught[0].message))


@pytest.mark.parametrize("scales", [(0.2, 5, 5, 5), (0.2, *[5] * 7)])
def test_what_few_batches_clip_is_told_once(scales):
    compiled = qrecipe.compile(model(), STATIC, batches(1)[0])
    prepared = compiled.prepare()
    with pytest.warns(QRecipeWarning) as caught:
        qrecipe.calibrate(prepared, batches(*scales), progress=silent)
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith("QR201")
    assert "is clipped by" in text
    few_accepted = recipe('[lint]\nignore = ["QR201", "QR203"]')
    with pytest.warns(QRecipeWarning, match="^QR232"):
        quantized(scales, few_accepted)


# --- few batches that differ little: nothing is three times narrower, and much is clipped


def rows(*scales):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 8, generator=generator) * scale for scale in scales]


LOUDER = rows(0.8, *[1.6] * 7)


def said(batches, a_recipe=STATIC):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QRecipeWarning)
        converted = qrecipe.quantize(model(), a_recipe, batches, progress=silent)
    return converted, [str(warning.message) for warning in caught]


def test_few_batches_are_said_to_be_clipped_with_what_is_lost_where_minmax_loses_nothing():
    converted, (text,) = said(LOUDER)
    assert text.startswith("QR201 calibrated on only 8 batches, of which the first weighs 93%")
    claim = re.search(
        r'and (\S+) dB on batch (\d), with "minmax" (\S+) and (\S+) dB\n', text
    ).groups()
    reached, batch, _, promised = map(float, claim)
    worst = LOUDER[int(batch)]
    assert sqnr_db(model()(worst), converted(worst)) == pytest.approx(reached, abs=2)
    better, told = said(LOUDER, recipe('[tensor.activation]\nobserver = "minmax"'))
    assert sqnr_db(model()(worst), better(worst)) == pytest.approx(promised, abs=6)
    assert promised > reached + 6
    assert told == ["QR201 calibrated on only 8 batches\n  " + PLENTY]


PLENTY = "about 100 representative mini-batches are enough"


def test_the_loudest_batch_first_clips_nothing_and_only_its_weight_is_said():
    _, (text,) = said(rows(4, *[1] * 7))
    assert text == (
        "QR201 calibrated on only 8 batches, of which the first weighs 93% in moving averages\n  "
        + PLENTY
    )


def test_from_ten_batches_on_it_is_a_warning_where_a_batch_is_spoilt():
    _, texts = said(rows(1, *[2.8] * 15))
    assert [text[:5] for text in texts] == ["QR232"]
    assert "first of 16 batches, which weighs 86%" in texts[0]
    assert [text[:5] for text in said(rows(*[1] * 16))[1]] == ["QR234"]


def test_one_batch_weighs_all_and_that_goes_without_saying():
    assert said(LOUDER[:1])[1] == ["QR201 calibrated on only 1 batch\n  " + PLENTY]


class Quarter(MinMaxObserver):
    """Keeps the middle quarter of what it saw."""

    def calculate_qparams(self):
        return self._calculate_qparams(self.min_val / 4, self.max_val / 4)


def test_other_observers_than_averages_are_told_of_by_the_extremes_that_they_keep():
    qrecipe.register_observer("quarter")(Quarter)
    narrow = recipe('[tensor.activation]\nobserver = "quarter"\nreduce_range = false')
    batches = rows(0.5, *[3] * 15)
    try:
        prepared = qrecipe.compile(model(), narrow, batches[0], target_cpu="vnni").prepare()
        with pytest.warns(QRecipeWarning, match="^QR233.*is clipped by") as caught:
            qrecipe.calibrate(prepared, batches, progress=silent)
    finally:
        registered.remove("observer", "quarter")
    (warning,) = caught
    assert "averag" not in str(warning.message)


def test_without_a_pass_more_only_one_call_of_the_model_is_kept():
    compiled = qrecipe.compile(model(), STATIC, LOUDER[0])
    prepared, calls = compiled.prepare(), []
    prepared.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(QRecipeWarning, match="QR201"):
        qrecipe.calibrate(prepared, iter(LOUDER), progress=silent)
    assert len(calls) == len(LOUDER)


@pytest.mark.filterwarnings("ignore:QR232:qrecipe.QRecipeWarning")
def test_the_batch_that_is_told_of_is_the_worst_although_an_average_was_narrower_before():
    """Against the average of that moment an early batch goes further."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(8, 4, 3)).eval()
    images = [torch.randn(4, 3, 10, 10) * (0.2 if not index else 1) for index in range(100)]
    compiled = qrecipe.compile(net, STATIC, images[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, images, progress=silent)
    converted = compiled.convert(prepared)
    with torch.no_grad():
        reached = [sqnr_db(net(x), converted(x)) for x in images]
    claims = re.findall(r"(\S+) dB on batch (\d+), with", prepared_state(prepared).clipping)
    assert [(float(db), int(batch)) for db, batch in claims] == [
        (pytest.approx(min(reached), abs=1), reached.index(min(reached)))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_farthest_call_is_kept_for_whatever_range_comes_out_and_no_more_than_three(seed):
    torch.manual_seed(seed)
    observer = MinMaxObserver(dtype=torch.quint8, reduce_range=False)
    candidates, seen = Candidates(observer), []
    for _ in range(20):
        x = torch.randn(2) * 3
        candidates.see(observer, (x,))
        candidates.note(None, (x,), {}, x)
        seen.append((float(x.min()), float(x.max())))
    kept = set()
    for low, high in torch.rand(50, 2) * 5:
        observer.min_val, observer.max_val = -low, high
        farthest = candidates.farthest()
        kept.add(farthest.batch)
        codes = code_range(observer)
        most = max(outside(codes, each) for each in seen[1:])
        assert outside(codes, seen[farthest.batch]) == most
        assert torch.equal(farthest.sample.output, farthest.sample.inputs.args[0])
    assert 0 not in kept
    assert len(kept) <= 3


# --- enough for other observers, and few for an average


def codes(count, a_recipe=STATIC):
    return [text[:5] for text in said(batches(*[1] * count), a_recipe)[1]]


def test_what_the_ranges_clip_is_said_with_the_weight_where_it_costs_accuracy():
    (text,) = said(batches(0.5, *[1] * 15))[1]
    assert text.startswith("QR234 calibrated on 16 batches, of which the first weighs 86%")
    assert re.search(r"averages: the input of 0 is clipped by \d+% ", text)
    assert re.search(r'on the first batch and 1\d\.\d dB on batch \d+, with "minmax"', text)


def test_a_hundred_batches_are_enough_unless_accuracy_is_lost_all_the_same():
    (text,) = said(batches(0.1, *[1] * 99))[1]
    assert text.startswith("QR232 the moving averages depend too much on the first of 100 batches")
    assert re.search(r"on the first batch and 1\d\.\d dB on batch \d+", text)


def test_from_ten_to_a_hundred_batches_it_is_said_what_the_first_weighs():
    assert said(batches(*[1] * 12))[1] == [
        "QR234 calibrated on 12 batches, of which the first weighs 90% in moving averages\n"
        '  use about 100 batches, or observe with "minmax", which does not depend on their order'
    ]
    assert {count: codes(count) for count in (9, 10, 99, 100)} == {
        9: ["QR201"],
        10: ["QR234"],
        99: ["QR234"],
        100: [],
    }


@pytest.mark.parametrize(
    "a_recipe",
    [
        "builtin:x86-static-minmax",
        "builtin:x86-static-histogram",
        qrecipe.parse_recipe(
            'format = 1\nextends = "builtin:x86-dynamic"\n[lint]\nignore = ["QR207"]'  # it is small
        ),
        recipe('[lint]\nignore = ["QR234"]'),
    ],
    ids=["minmax", "histogram", "dynamic", "accepted"],
)
def test_nothing_is_said_without_an_average_or_where_it_is_accepted(a_recipe):
    assert codes(10, a_recipe) == []


def test_nothing_is_said_of_a_first_batch_that_a_larger_constant_makes_light():
    constant = '{ name = "moving_average_minmax", averaging_constant = %s }'
    observed = "[tensor.activation]\nobserver = " + constant
    assert codes(10, recipe(observed % 0.1)) == ["QR234"]  # 39 %
    assert codes(10, recipe(observed % 0.11)) == []  # 35 %


def test_an_accepted_warning_of_clinging_averages_does_not_give_way_to_the_milder_one():
    accepted = recipe('[lint]\nignore = ["QR232"]')
    assert said(rows(1, *[2.8] * 15), accepted)[1] == []


def test_nothing_is_said_before_training_which_goes_on_with_the_averages():
    prepared = qrecipe.compile(model(), recipe('phase = "qat"'), batches(1)[0]).prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("error", QRecipeWarning)
        qrecipe.calibrate(prepared, batches(*[1] * 12), progress=silent)


def test_of_a_search_only_the_first_trial_says_it():
    (x,) = batches(1)

    def evaluate(net):
        return min(100.0, sqnr_db(model()(x), net(x)))

    with pytest.warns(QRecipeWarning) as caught:
        found = qrecipe.tune(
            model(), STATIC, batches(*[1] * 10), evaluate, max_drop=50, progress=silent
        )
    assert len(found.trials) > 2
    assert [str(warning.message)[:5] for warning in caught].count("QR234") == 1


def test_samples_beside_copies_that_are_not_rounded_give_what_they_give_alone():
    compiled = qrecipe.compile(model(), STATIC, batches(1)[0])
    prepared = compiled.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qrecipe.calibrate(prepared, batches(1, 2), progress=silent)
    x = batches(2)[0]
    sample = Sample(Inputs.from_batch(x), model()(x).detach())
    own = {observer: observer for _, observer in static_observers(prepared)}
    beside = side_by_side_db(prepared, own, sample)
    assert beside == pytest.approx(rounded_db(prepared, own, sample), abs=1e-3)
