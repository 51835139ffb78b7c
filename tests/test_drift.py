"""Stored ranges held against data: what is found is what recalibration gives."""

from __future__ import annotations

import functools
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from corpus import CORPUS, missing
from nets import NETS
from runs import HEAD, STATIC, silent
from test_roots import Routed
from test_roots import recipe as rooted
from torch import nn

import qrecipe
from qrecipe import registered
from qrecipe.errors import ArtifactError, CalibrationError, ExecutionError, QRecipeWarning
from qrecipe.measure.distribution import Distribution

WIDE = qrecipe.parse_recipe(
    f"{HEAD}[tensor.activation]\nobserver = 'minmax'\nreduce_range = false\n"
)


@functools.cache
def quantized(name, a_recipe=STATIC):
    net = NETS[name]
    model, batches = net.model(), net.batches(10)
    return model, qrecipe.quantize(model, a_recipe, batches, progress=silent), batches


def by_tensor(report):
    return {(site.name, site.tensor): site for site in report.sites}


@pytest.mark.parametrize("name", NETS)
def test_the_data_of_calibration_give_the_stored_ranges_again(name):
    _, converted, batches = quantized(name)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert report.sites
    assert report.batches == 10
    # the weights are rounded now, and were not in calibration
    assert max(site.moved for site in report.sites) < 0.03
    assert not any(site.is_bound for site in report.sites)
    assert report.drifted() == ()


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "densenet121", "vit_b_16"])
def test_deep_networks_find_their_ranges_again(name):
    net = CORPUS[name]
    batches = net.batches(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(net.model(), STATIC, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert not any(site.is_bound for site in report.sites)
    assert max(site.moved for site in report.sites) < 0.1


@pytest.mark.parametrize("name", ["residual", "functional", "attention", "binary", "norms"])
def test_the_ranges_of_today_are_those_of_a_recalibration(name):
    model, converted, batches = quantized(name)
    shifted = [batch * 3 + 1 for batch in batches]
    report = by_tensor(qrecipe.drift(converted, shifted, progress=silent))
    again = qrecipe.quantize(model, STATIC, shifted, progress=silent)
    recalibrated = by_tensor(qrecipe.drift(again, shifted, progress=silent))
    assert report.keys() == recalibrated.keys()
    for tensor, site in report.items():
        stored = recalibrated[tensor].stored
        width = stored.high - stored.low
        assert site.now.low == pytest.approx(stored.low, abs=0.05 * width), tensor
        assert site.now.high == pytest.approx(stored.high, abs=0.05 * width), tensor


def test_what_recalibration_would_give_in_db_is_what_it_gives():
    model, converted, batches = quantized("residual")
    shifted = [batch * 3 + 1 for batch in batches]
    report = by_tensor(qrecipe.drift(converted, shifted, progress=silent))
    again = qrecipe.quantize(model, STATIC, shifted, progress=silent)
    for tensor, site in by_tensor(qrecipe.drift(again, shifted, progress=silent)).items():
        assert report[tensor].sqnr_after_db == pytest.approx(site.sqnr_db, abs=1.5)
        assert report[tensor].sqnr_db < site.sqnr_db


def test_the_share_of_clipped_values_is_counted_exactly():
    torch.manual_seed(0)
    batches = [torch.rand(8, 4) * 2 - 1 for _ in range(10)]
    batches[0][0, :2] = torch.tensor([-1.0, 1.0])
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    converted = qrecipe.quantize(model, WIDE, batches, progress=silent)
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
    narrow = qrecipe.parse_recipe(f"{HEAD}[tensor.activation]\nobserver = 'minmax'\n")
    _, converted, batches = quantized("mlp", narrow)
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
    assert entry not in report.drifted(entry.moved)
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
    converted = qrecipe.quantize(model, rooted(["backbone", "head"]), batches, progress=silent)
    same = qrecipe.drift(converted, batches, progress=silent)
    assert {site.name.split(".")[0] for site in same.sites} == {"backbone", "head"}
    assert same.drifted() == ()
    wild = qrecipe.drift(converted, [batch * 10 for batch in batches], progress=silent)
    assert wild.drifted()


def test_a_reference_model_for_export_has_the_same_ranges():
    net = NETS["residual"]
    batches = net.batches(10)
    exported = qrecipe.parse_recipe(
        HEAD.replace("x86-static", "arm-static") + 'backend = "executorch"\n'
    )
    converted = qrecipe.quantize(net.model(), exported, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    native = qrecipe.drift(quantized("residual")[1], batches, progress=silent)
    assert set(by_tensor(report)) == set(by_tensor(native))
    assert max(site.moved for site in report.sites) < 0.03


@pytest.mark.parametrize("backend", ["fbgemm", "onednn", "qnnpack"])
def test_other_engines_are_judged_alike(backend):
    if backend not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no {backend}")
    other = qrecipe.parse_recipe(f'{HEAD}backend = "{backend}"\n')
    for name in ("residual", "decoder"):
        net = NETS[name]
        batches = net.batches(10)
        converted = qrecipe.quantize(net.model(), other, batches, progress=silent)
        report = qrecipe.drift(converted, batches, progress=silent)
        assert max(site.moved for site in report.sites) < 0.03
        assert not any(site.is_bound for site in report.sites)


class Kernels(nn.Module):
    """Operations with int8 kernels of their own that the nets do without."""

    def __init__(self, output_padding):
        super().__init__()
        self.norm, self.also = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.instance, self.elu = nn.InstanceNorm2d(4, affine=True), nn.ELU()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=output_padding, groups=2)
        self.weight = nn.Parameter(torch.randn(4, 4, 2, 2) / 4)
        self.one, self.three = nn.Conv1d(4, 4, 3, dilation=2), nn.Conv3d(4, 4, (1, 3, 3))
        self.line = nn.Parameter(torch.randn(6, 4, 3) / 4)

    def forward(self, x):
        y = torch.relu(self.also(self.norm(x)))
        y = self.elu(self.instance(torch.relu(self.conv(y) + y)))
        y = F.hardswish(F.leaky_relu(F.elu(F.instance_norm(y)), 0.1))
        y = F.conv_transpose2d(self.up(y), self.weight, stride=(2, 1))
        z = self.three(y.unsqueeze(2)).squeeze(2)
        z = F.conv1d(self.one(z.flatten(2)), self.line, stride=2)
        return torch.mul(z, z).relu()


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_kernel_has_its_float_counterpart(backend):
    torch.manual_seed(0)
    batches = [torch.randn(2, 4, 8, 8) for _ in range(10)]
    recipe = qrecipe.parse_recipe(
        f'{HEAD}backend = "{backend}"\n[tensor.weight]\nobserver = "minmax"\n'
        'qscheme = "per_tensor_symmetric"\n[tensor.activation]\nobserver = "minmax"\n'
    )
    model = Kernels(0 if backend == "onednn" else 1).eval()  # which onednn has not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(model, recipe, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert len(report.sites) > 8
    for site in report.sites:
        assert not site.is_bound, site.name
        assert site.moved < 0.05, site
        assert site.sqnr_db > 18, site


def test_histogram_observers_find_their_range_again():
    recipe = qrecipe.load_recipe("builtin:x86-static-histogram")
    net = NETS["mlp"]
    batches = net.batches(10)
    converted = qrecipe.quantize(net.model(), recipe, batches, progress=silent)
    report = qrecipe.drift(converted, batches, progress=silent)
    assert max(site.moved for site in report.sites) < 0.1


def test_a_kernel_without_a_float_counterpart_gives_lower_bounds(monkeypatch):
    from qrecipe.measure import drifting
    from qrecipe.measure.floating import UnknownKernelError

    def unknown(node, *_):
        raise UnknownKernelError(str(node.target))

    monkeypatch.setattr(drifting, "float_result", unknown)
    _, converted, batches = quantized("mlp")
    report = qrecipe.drift(converted, [batch * 20 for batch in batches], progress=silent)
    found = by_tensor(report)["fc1", "output"]
    assert found.is_bound
    assert found.sqnr_db is None
    assert 0 < found.clipped < 1
    assert "≥" in str(report)


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
        converted, labelled, lambda model, batch: model(batch[0]), progress=silent
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


def test_counts_survive_the_widening_of_their_bins():
    torch.manual_seed(0)
    parts = [torch.randn(1000), torch.randn(1000) * 50, torch.zeros(10), torch.randn(500) * 0.1]
    counted = Distribution()
    for part in parts:
        counted.add(part)
    histogram = counted.histogram(16)
    values = torch.cat(parts)
    expected = torch.histc(values, 16, histogram.low, histogram.high)
    assert sum(histogram.counts) == values.numel()
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    difference = torch.tensor(histogram.counts) - expected
    assert difference.abs().max() <= 40  # a bin of 8192 lies across an edge


def test_infinity_is_left_out_of_the_counts():
    counted = Distribution()
    counted.add(torch.tensor([1.0, math.inf, -2.0, math.nan]))
    histogram = counted.histogram(4)
    assert (histogram.low, histogram.high, sum(histogram.counts)) == (-2, 1, 2)
    assert Distribution().histogram() is None
