"""Stored ranges held against data: what is found is what recalibration gives."""

from __future__ import annotations

import functools
import json
import math
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from corpus import CORPUS, missing
from nets import NETS
from routed import Routed, recipe_of_roots
from runs import HEAD, STATIC, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.errors.findings import ArtifactError, CalibrationError, ExecutionError, QRecipeWarning
from qrecipe.measure.drift.report import DEFAULT_MAX_CLIPPED
from qrecipe.registry import table as registered

ANYWHERE = "[lint]\nignore = ['QR226']\n"  # made with 8 bits on CPUs without VNNI too
WIDE = qrecipe.parse_recipe(
    f"{HEAD}{ANYWHERE}[tensor.activation]\nobserver = 'minmax'\nreduce_range = false\n"
)


MINMAX = qrecipe.parse_recipe(f"{HEAD}[tensor.activation]\nobserver = 'minmax'\n")
AVERAGE = qrecipe.parse_recipe(f"{HEAD}{ANYWHERE}[tensor.activation]\nreduce_range = false\n")
HISTOGRAM = qrecipe.load_recipe("builtin:x86-static-histogram")


@functools.cache
def quantized(name, a_recipe=MINMAX):
    net = NETS[name]
    model, batches = net.model(), net.batches(10)
    return (
        model,
        qrecipe.quantize(model, a_recipe, batches, progress=silent, target_cpu="vnni"),
        batches,
    )


def by_tensor(report):
    return {(site.name, site.tensor): site for site in report.sites}


def names(sites):
    return {(site.name, site.tensor) for site in sites}


def brighter(batches, indices, factor):
    return [batch * factor if at in indices else batch for at, batch in enumerate(batches)]


@pytest.mark.parametrize("name", every(4, NETS))
def test_the_data_of_calibration_give_the_stored_ranges_again(name):
    _, converted, batches = quantized(name)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert report.sites
    assert report.batches == 10
    # the weights are rounded now, and were not in calibration
    assert max(site.moved for site in report.sites) < 0.03
    assert not any(site.is_bound for site in report.sites)
    assert report.drifted() == ()
    for site in report.sites:
        assert site.sqnr_after_db == pytest.approx(site.sqnr_db, abs=1.5), site


RECIPES = {"static": STATIC, "average": AVERAGE, "wide": WIDE, "histogram": HISTOGRAM}
WITH_ALL = ("residual",)


def _runs():
    """A quarter of the nets with one of the recipes always, one with each, the rest as slow."""
    for (at, name), (place, recipe) in product(enumerate(NETS), enumerate(RECIPES)):
        is_always = name in WITH_ALL or at % 16 == 4 * place + 1
        yield pytest.param(name, recipe, marks=[] if is_always else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "recipe"), list(_runs()))
def test_the_data_of_calibration_have_not_drifted(name, recipe):
    _, converted, batches = quantized(name, RECIPES[recipe])
    report = qrecipe.drift(converted, batches, progress=silent)
    assert report.drifted() == ()
    assert max(site.avoidable for site in report.sites) < DEFAULT_MAX_CLIPPED


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mlp", STATIC),
        ("mlp", AVERAGE),
        pytest.param("residual", AVERAGE, marks=pytest.mark.slow),
        ("residual", HISTOGRAM),
    ],
)
def test_the_order_of_the_batches_makes_no_difference(name, recipe):
    _, converted, batches = quantized(name, recipe)
    mixed = brighter(batches, range(3, 10), 4)
    orders = [mixed, mixed[::-1], mixed[5:] + mixed[:5]]
    reports = [qrecipe.drift(converted, order, progress=silent) for order in orders]
    first = by_tensor(reports[0])
    for report in reports:
        assert names(report.drifted()) == names(reports[0].drifted()) != set()
        for tensor, site in by_tensor(report).items():
            # torch merges histograms one after another, which is not exact
            assert site.moved == pytest.approx(first[tensor].moved, rel=0.05, abs=0.02)
            assert site.clipped == first[tensor].clipped


@pytest.mark.parametrize("case", every(4, product([STATIC, AVERAGE, HISTOGRAM], [0, 4, 9])))
def test_data_of_which_one_batch_is_as_it_was_have_drifted(case):
    recipe, normal = case
    torch.manual_seed(0)
    batches = [torch.rand(4, 3, 16, 16) for _ in range(10)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    converted = qrecipe.quantize(model, recipe, batches, progress=silent, target_cpu="vnni")
    today = brighter(batches, {*range(10)} - {normal}, 5)
    report = qrecipe.drift(converted, today, progress=silent)
    assert names(report.drifted()) == names(report.sites)
    entry = by_tensor(report)["0", "input"]
    assert entry.clipped > 0.5
    assert entry.now.high == pytest.approx(5 if recipe is HISTOGRAM else 4.6, rel=0.05)


def test_values_that_are_clipped_without_need_are_drift_however_near_the_range():
    """Most values lie where the range ends: a small move saves many."""
    torch.manual_seed(0)
    batches = [torch.rand(64, 4).round() for _ in range(10)]
    converted = qrecipe.quantize(
        nn.Sequential(nn.Linear(4, 4)).eval(), AVERAGE, batches, target_cpu="vnni"
    )
    report = qrecipe.drift(converted, [batch * 1.2 for batch in batches], progress=silent)
    entry = by_tensor(report)["0", "input"]
    assert entry.moved == pytest.approx(0.2, abs=0.01)
    assert entry.clipped == entry.avoidable == pytest.approx(0.5, abs=0.02)
    assert entry in report.drifted()
    assert entry not in report.drifted(max_clipped=entry.avoidable)
    assert report.drifted(0.5, max_clipped=1.0) == ()
    assert entry.sqnr_after_db > entry.sqnr_db + 20


def test_what_an_average_clips_on_purpose_is_no_drift():
    _, converted, batches = quantized("mlp", AVERAGE)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert max(site.clipped for site in report.sites) > 0.05
    assert max(site.avoidable for site in report.sites) < 0.01  # today's average clips the rest
    assert report.drifted() == ()


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "densenet121", "vit_b_16"])
def test_deep_networks_find_their_ranges_again(name):
    net = CORPUS[name]
    batches = net.batches(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(net.model(), MINMAX, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert not any(site.is_bound for site in report.sites)
    assert max(site.moved for site in report.sites) < 0.1


@pytest.mark.filterwarnings("ignore:QR2")
@pytest.mark.parametrize(
    "name", every(2, ["residual", "functional", "attention", "binary", "norms"])
)
def test_the_ranges_of_today_are_those_of_a_recalibration(name):
    model, converted, batches = quantized(name)
    shifted = [batch * 3 + 1 for batch in batches]
    report = by_tensor(qrecipe.drift(converted, shifted, progress=silent))
    again = qrecipe.quantize(model, MINMAX, shifted, progress=silent)
    recalibrated = by_tensor(qrecipe.drift(again, shifted, progress=silent))
    assert report.keys() == recalibrated.keys()
    for tensor, site in report.items():
        stored = recalibrated[tensor].stored
        width = stored.high - stored.low
        assert site.now.low == pytest.approx(stored.low, abs=0.05 * width), tensor
        assert site.now.high == pytest.approx(stored.high, abs=0.05 * width), tensor


@pytest.mark.filterwarnings("ignore:QR232")
def test_an_average_of_today_is_the_mean_of_the_extremes():
    torch.manual_seed(0)
    batches = [torch.rand(8, 4) * (1 + at) - 1 for at in range(10)]
    converted = qrecipe.quantize(
        nn.Sequential(nn.Linear(4, 4)).eval(), AVERAGE, batches, target_cpu="vnni"
    )
    entry = by_tensor(qrecipe.drift(converted, batches, progress=silent))["0", "input"]
    low, high = (sum(float(end(b)) for b in batches) / 10 for end in (torch.min, torch.max))
    assert entry.now.low == pytest.approx(low, abs=entry.now.scale)
    assert entry.now.high == pytest.approx(high, abs=entry.now.scale)
    assert entry.stored.high < high / 2  # clings to the first


def test_what_recalibration_would_give_in_db_is_what_it_gives():
    model, converted, batches = quantized("residual")
    shifted = [batch * 3 + 1 for batch in batches]
    report = by_tensor(qrecipe.drift(converted, shifted, progress=silent))
    again = qrecipe.quantize(model, MINMAX, shifted, progress=silent)
    for tensor, site in by_tensor(qrecipe.drift(again, shifted, progress=silent)).items():
        assert report[tensor].sqnr_after_db == pytest.approx(site.sqnr_db, abs=1.5)
        assert report[tensor].sqnr_db < site.sqnr_db


def test_both_sqnr_are_those_of_the_same_values():
    torch.manual_seed(0)
    batches = [torch.rand(64, 4) for _ in range(10)]
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    converted = qrecipe.quantize(model, WIDE, batches, progress=silent, target_cpu="vnni")
    shifted = [batch * 3 for batch in batches]
    for site in qrecipe.drift(converted, shifted, progress=silent).sites:
        if site.tensor == "input":
            value = torch.cat(shifted).double()
        else:  # what float gives for inputs that nothing has clipped
            layer = converted.get_submodule("0")
            weight, bias = layer.weight().dequantize(), layer.bias().detach()
            value = F.linear(torch.cat(shifted), weight, bias).double()
        for kept_by, found in ((site.stored, site.sqnr_db), (site.now, site.sqnr_after_db)):
            noise = value - kept_by.rounded(value)
            assert found == pytest.approx(20 * math.log10(value.norm() / noise.norm()), abs=0.3)


def test_the_share_of_clipped_values_is_counted_exactly():
    torch.manual_seed(0)
    batches = [torch.rand(8, 4) * 2 - 1 for _ in range(10)]
    batches[0][0, :2] = torch.tensor([-1.0, 1.0])
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    converted = qrecipe.quantize(model, WIDE, batches, progress=silent, target_cpu="vnni")
    value = torch.zeros(10, 4)
    value[:3, 0], value[3, 1], value[4, 2] = 5.0, -3.0, 0.99
    site = by_tensor(qrecipe.drift(converted, [value], progress=silent))["0", "input"]
    assert site.clipped == site.outside == 4 / 40
    assert site.stored.low == pytest.approx(-1, abs=0.02)
    assert (site.now.low, site.now.high) == pytest.approx((-3, 5), abs=0.05)
    assert site.moved == pytest.approx(3, abs=0.05)
    kept = value.clamp(site.stored.low, site.stored.high)
    expected = 20 * math.log10(float(value.norm() / (value - kept).norm()))
    assert site.sqnr_db == pytest.approx(expected, abs=0.1)


def test_seven_bits_have_integers_to_spare_before_kernels_clip():
    _, converted, batches = quantized("mlp", MINMAX)
    report = qrecipe.drift(converted, [batch * 1.5 for batch in batches], progress=silent)
    first = by_tensor(report)["fc1", "output"]
    assert first.outside > first.clipped == 0


@pytest.mark.parametrize("factor", [0.2, 10.0])
def test_data_of_another_size_move_every_range(factor):
    _, converted, batches = quantized("residual")
    report = qrecipe.drift(converted, [batch * factor for batch in batches], progress=silent)
    moved = [site.moved for site in report.sites]
    assert moved == sorted(moved, reverse=True)
    entry = by_tensor(report)["conv1", "input"]
    assert entry.moved == pytest.approx(abs(factor - 1), rel=0.05)
    assert entry in report.drifted()
    assert entry not in report.drifted(entry.moved, max_clipped=1.0)
    if factor < 1:
        assert entry.clipped == 0
        assert entry.sqnr_after_db > entry.sqnr_db + 10


def test_a_range_behind_a_clipped_one_is_judged_by_what_would_arrive_there():
    _, converted, batches = quantized("mlp")
    report = qrecipe.drift(converted, [batch * 20 for batch in batches], progress=silent)
    assert all(site.moved > 5 for site in report.sites)


def test_sites_without_a_range_of_their_own_are_not_listed():
    _, converted, batches = quantized("squeeze_excite")
    names = {site.name for site in qrecipe.drift(converted, batches, progress=silent).sites}
    assert "gate" not in names  # a sigmoid fixes its range
    assert "pool" not in names  # copies keep that of their input


@pytest.mark.parametrize("name", ["residual", "functional", "decoder", "nested"])
def test_a_loaded_model_gives_the_same_report(name, tmp_path):
    model, converted, batches = quantized(name)
    path = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, path)
    loaded = qrecipe.load_quantized(path, model)
    reports = [qrecipe.drift(each, batches[:3], progress=silent) for each in (converted, loaded)]
    assert reports[0].to_json() == reports[1].to_json()


def test_the_model_computes_the_same_afterwards():
    _, converted, batches = quantized("in_place")
    with torch.no_grad():
        before = converted(batches[0])
        kept = {key: str(value) for key, value in converted.state_dict().items()}
        copies = [batch.clone() for batch in batches]
        qrecipe.drift(converted, batches, progress=silent)
        assert torch.equal(converted(batches[0]), before)
    assert {key: str(value) for key, value in converted.state_dict().items()} == kept
    assert all(torch.equal(a, b) for a, b in zip(copies, batches, strict=True))


def test_roots_are_judged_each_by_what_it_is_given():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(10)]
    model = Routed().eval()
    converted = qrecipe.quantize(
        model, recipe_of_roots(["backbone", "head"]), batches, progress=silent
    )
    same = qrecipe.drift(converted, batches, progress=silent)
    assert {site.name.split(".")[0] for site in same.sites} == {"backbone", "head"}
    assert same.drifted() == ()
    wild = qrecipe.drift(converted, [batch * 10 for batch in batches], progress=silent)
    assert wild.drifted()


def test_a_reference_model_for_export_has_the_same_ranges():
    net = NETS["residual"]
    batches = net.batches(10)
    exported = qrecipe.parse_recipe(
        HEAD.replace("x86-static", "arm-static")
        + 'backend = "executorch"\n[tensor.activation]\nobserver = "minmax"\n'
    )
    converted = qrecipe.quantize(net.model(), exported, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    native = qrecipe.drift(quantized("residual")[1], batches, progress=silent)
    assert set(by_tensor(report)) == set(by_tensor(native))
    assert max(site.moved for site in report.sites) < 0.03


def test_histogram_observers_find_their_range_again():
    _, converted, batches = quantized("mlp", HISTOGRAM)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert max(site.moved for site in report.sites) < 0.1


def test_a_kernel_without_a_float_counterpart_gives_upper_bounds(monkeypatch):
    from qrecipe.audit.float_kernels import UnknownKernelError
    from qrecipe.measure.drift import today

    def unknown(node, *_):
        raise UnknownKernelError(str(node.target))

    monkeypatch.setattr(today, "float_result", unknown)
    _, converted, batches = quantized("mlp")
    report = qrecipe.drift(converted, [batch * 20 for batch in batches], progress=silent)
    found = by_tensor(report)["fc1", "output"]
    assert found.is_bound
    assert found.sqnr_db is found.sqnr_after_db is None
    assert 0 < found.clipped < 1
    assert found.avoidable == 0  # a rectified zero lies at an end and is not clipped
    assert "≤" in str(report)


def test_an_observer_that_is_not_here_is_stood_in_for():
    without = registered.snapshot()

    @qrecipe.register_observer("of_this_test")
    class Observer(qrecipe._torch_ao.MinMaxObserver):
        pass

    text = f"{HEAD}{{lint}}[tensor.activation]\nobserver = 'of_this_test'\n"
    plugin, accepting = (
        qrecipe.parse_recipe(text.format(lint=lint)) for lint in ("", "lint.ignore = ['QR213']\n")
    )
    net = NETS["mlp"]
    batches = net.batches(10)
    try:
        converted = qrecipe.quantize(net.model(), plugin, batches, progress=silent)
        accepted = qrecipe.quantize(net.model(), accepting, batches, progress=silent)
        assert qrecipe.drift(converted, batches, progress=silent).drifted() == ()
    finally:
        registered.restore(without)
    with pytest.warns(QRecipeWarning, match='QR213 observer "of_this_test"'):
        report = qrecipe.drift(converted, batches, progress=silent)
    assert report.drifted() == ()
    qrecipe.drift(accepted, batches, progress=silent)


def test_a_trained_model_is_judged_by_the_observers_of_calibration():
    from artifacts import trained

    recipe = qrecipe.parse_recipe(f'{HEAD}phase = "qat"\n')
    compiled, prepared = trained(NETS["mlp"], recipe)
    converted = compiled.convert(prepared)
    report = qrecipe.drift(converted, NETS["mlp"].batches(3), progress=silent)
    assert {site.name for site in report.sites} == {"fc1", "fc2"}
    assert all(site.moved < 0.2 for site in report.sites)


def test_labelled_batches_and_keywords_are_taken_as_in_calibration():
    _, converted, batches = quantized("mlp")
    plain = qrecipe.drift(converted, batches, progress=silent)
    labelled = [(batch, 0) for batch in batches]
    with pytest.raises(CalibrationError, match="forward="):
        qrecipe.drift(converted, labelled, progress=silent)
    given = qrecipe.drift(
        converted, labelled, forward=lambda model, batch: model(batch[0]), progress=silent
    )
    named = qrecipe.drift(converted, [{"x": batch} for batch in batches], progress=silent)
    assert plain == given == named


def test_dynamic_models_have_nothing_that_could_drift():
    net = NETS["mlp"]
    converted = qrecipe.quantize(
        net.model(), "builtin:x86-dynamic", example_inputs=net.batches(1)[0]
    )
    with pytest.raises(ExecutionError, match="QR430"):
        qrecipe.drift(converted, net.batches(2), progress=silent)


def test_bad_batches_and_foreign_models_are_refused():
    model, converted, batches = quantized("mlp")
    with pytest.raises(ArtifactError, match="QR501"):
        qrecipe.drift(model, batches, progress=silent)
    with pytest.raises(CalibrationError, match="QR401"):
        qrecipe.drift(converted, [], progress=silent)
    with pytest.raises(CalibrationError, match="QR402"):
        qrecipe.drift(converted, [torch.zeros(2, 3, 4, 5)], progress=silent)
    with pytest.raises(CalibrationError, match="QR403"):
        qrecipe.drift(converted, [batches[0] * math.nan], progress=silent)
    with pytest.raises(CalibrationError, match="QR401"):
        qrecipe.drift(converted, batches[0], progress=silent)


def test_batches_without_values_are_a_finding_and_one_among_others_says_nothing():
    _, converted, batches = quantized("residual", STATIC)
    empty = batches[0][:0]
    with pytest.raises(
        CalibrationError, match="QR401 no value reached a stored range in 2 batches"
    ):
        qrecipe.drift(converted, [empty, empty], progress=silent)
    with pytest.raises(CalibrationError, match="QR401 no value"):
        qrecipe.drift(converted, batches, forward=lambda model, batch: None, progress=silent)
    report = qrecipe.drift(converted, [empty, *batches], progress=silent)
    assert report.sites == qrecipe.drift(converted, batches, progress=silent).sites


def test_a_root_that_is_not_called_today_has_not_drifted():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(10)]
    recipe = recipe_of_roots(["backbone", "head"])
    converted = qrecipe.quantize(Routed().eval(), recipe, batches, progress=silent)
    report = qrecipe.drift(converted, batches, forward=lambda m, x: m.backbone(x), progress=silent)
    head = [site for site in report.sites if site.name.startswith("head")]
    assert head
    assert all(site.is_unseen and site.moved == 0 for site in head)
    assert report.drifted() == ()
    assert "no values" in str(report)
    json.loads(report.to_json())


class Logarithm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.log(x)) + self.first(x)


def test_values_that_become_infinite_inside_are_said_in_words():
    torch.manual_seed(0)
    batches = [torch.rand(8, 4) + 1 for _ in range(10)]
    model = Logarithm().eval()
    converted = qrecipe.quantize(model, MINMAX, batches, progress=silent)
    report = qrecipe.drift(converted, [batch * 0 for batch in batches], progress=silent)
    table = str(report)
    assert "nan" not in table
    assert "not finite" in table
    assert "Tensors with values that are not finite: second (input)" in table
    entry = by_tensor(report)["second", "input"]
    assert not entry.is_finite
    assert entry in report.drifted()
    assert entry.sqnr_db is None
    json.loads(report.to_json())


def test_a_move_off_the_scale_is_shown_as_one():
    _, converted, batches = quantized("mlp")
    report = qrecipe.drift(converted, [batches[0] * 1e30], progress=silent)
    assert report.sites[0].moved > 1e20
    assert ">1000%" in str(report)
    assert max(map(len, str(report).splitlines())) < 150


def test_values_that_overflow_in_float_are_the_worst_and_no_traceback():
    _, converted, batches = quantized("mlp")
    report = qrecipe.drift(converted, [batches[0] * 1e38], progress=silent)
    assert math.isinf(report.sites[0].moved) or report.sites[0].moved > 1e6
    json.loads(report.to_json())
    assert str(report)


def test_json_and_table_hold_the_same():
    _, converted, batches = quantized("mlp")
    report = qrecipe.drift(converted, batches[:2], progress=silent)
    document = json.loads(report.to_json())
    assert document["batches"] == 2
    assert [site["name"] for site in document["sites"]] == [site.name for site in report.sites]
    entry = document["sites"][0]
    assert entry["stored"]["scale"] == report.sites[0].stored.scale
    assert entry["moved"] == report.sites[0].moved
    assert all(site.name in str(report) for site in report.sites)


def test_one_batch_after_another_is_read_once():
    _, converted, batches = quantized("mlp")
    listed = qrecipe.drift(converted, batches, progress=silent)
    streamed = qrecipe.drift(converted, iter(batches), progress=silent)
    assert listed == streamed
