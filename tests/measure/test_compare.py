"""Float beside int8, site by site, and the same by torch's Numeric Suite."""

from __future__ import annotations

import builtins
import copy
import functools
import json
import math

import pytest
import torch
from nets import NETS, UNTRACEABLE
from plans import net_of, recipe
from routed import Routed, recipe_of_roots
from runs import STATIC, silent
from shares import every
from torch import nn
from torch.ao.ns import _numeric_suite_fx as numeric_suite
from torch.ao.ns.fx.utils import compute_sqnr

import qrecipe
from qrecipe.audit.sqnr import Totals, output_sqnr_db, sqnr_db
from qrecipe.errors.findings import ArtifactError, CalibrationError, QRecipeError
from qrecipe.measure.pages.reports import comparison_page


@functools.cache
def quantized(name, a_recipe=STATIC, count=10):
    net = NETS[name]
    model, batches = net.model(), net.batches(count)
    return model, qrecipe.quantize(model, a_recipe, batches, progress=silent), batches


def by_name(report):
    return {site.name: site for site in report.sites}


@pytest.fixture
def suite(monkeypatch):
    """The Numeric Suite, without a lookup of labels that fails on models with fused modules."""
    monkeypatch.setattr("torch.ao.ns.fx.graph_passes._maybe_get_fqn", lambda node, gm: None)
    return numeric_suite


def prepared_and_converted(name):
    net = NETS[name]
    model, batches = net.model(), net.batches(10)
    compiled = qrecipe.compile(model, STATIC, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    return model, prepared, compiled.convert(prepared), batches


@pytest.mark.parametrize("name", ["residual", "mlp", "nested"])
def test_weights_agree_with_the_numeric_suite(suite, name):
    model, prepared, converted, batches = prepared_and_converted(name)
    ours = by_name(qrecipe.compare(model, converted, batches[:1], progress=silent))
    results = suite.extract_weights("float", prepared, "int8", converted)
    suite.extend_logger_results_with_comparison(results, "float", "int8", compute_sqnr, "sqnr")
    theirs = {key: entry["weight"]["int8"][0]["sqnr"][0].item() for key, entry in results.items()}
    expected = {
        site.name.replace(".", "_"): site.weight.sqnr_db for site in ours.values() if site.weight
    }
    assert theirs.keys() == expected.keys()
    assert theirs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["residual", "mlp", "nested"])
def test_activations_agree_with_the_numeric_suite(suite, name):
    model, prepared, converted, batches = prepared_and_converted(name)
    ours = by_name(qrecipe.compare(model, converted, batches[:1], progress=silent))
    loggers = suite.add_loggers("float", prepared, "int8", converted, suite.OutputLogger)
    for logging in loggers:
        logging(batches[0])
    results = suite.extract_logger_info(*loggers, suite.OutputLogger, "int8")
    suite.extend_logger_results_with_comparison(results, "float", "int8", compute_sqnr, "sqnr")
    logged = [entry["node_output"]["int8"][0] for entry in results.values()]
    values = [entry["sqnr"][0].item() for entry in logged]
    expected = [site.activation.sqnr_db for site in ours.values() if site.verdict == "quantized"]
    assert len(values) >= len(expected)
    for value in expected:
        assert min(abs(value - other) for other in values) < 1e-4


def test_a_fused_site_is_matched_with_what_its_last_member_gives():
    model, converted, batches = quantized("residual")
    first = by_name(qrecipe.compare(model, converted, batches[:1], progress=silent))["conv1"]
    with torch.no_grad():
        expected = torch.relu(model.bn1(model.conv1(batches[0])))
        actual = converted.conv1(
            torch.quantize_per_tensor(
                batches[0], converted.conv1_input_scale_0, converted.conv1_input_zero_point_0, 13
            )
            if hasattr(converted, "conv1_input_scale_0")
            else _quantized_input(converted, batches[0])
        ).dequantize()
    assert first.op == "Conv2d+BatchNorm2d+ReLU"
    assert first.activation.sqnr_db == pytest.approx(sqnr_db(expected, actual), abs=1e-4)


def _quantized_input(converted, batch):
    node = next(n for n in converted.graph.nodes if n.target is torch.quantize_per_tensor)
    scale, zero = (getattr(converted, arg.target) for arg in node.args[1:3])
    return torch.quantize_per_tensor(batch, scale, zero, node.args[3])


def test_output_over_batches_is_that_of_all_outputs_together():
    model, converted, batches = quantized("residual")
    report = qrecipe.compare(model, converted, iter(batches), progress=silent)
    with torch.no_grad():
        outputs = [torch.cat([net(batch) for batch in batches]) for net in (model, converted)]
    assert report.batches == 10
    assert report.output.sqnr_db == pytest.approx(sqnr_db(*outputs), abs=1e-4)
    mse = torch.mean((outputs[0] - outputs[1]).double() ** 2).item()
    assert report.output.mse == pytest.approx(mse, rel=1e-4)


@pytest.mark.parametrize("name", every(4, NETS))
def test_every_site_of_every_net_is_compared(name):
    model, converted, batches = quantized(name)
    report = qrecipe.compare(model, converted, batches[:2], progress=silent)
    plan = json.loads(qrecipe.provenance(converted).plan)
    assert {site.name for site in report.sites} == {site["name"] for site in plan["sites"]}
    assert all(site.activation is not None for site in report.sites)
    with_weight = {s["name"] for s in plan["sites"] if s["qconfig"] and s["qconfig"]["weight"]}
    assert {site.name for site in report.sites if site.weight} == with_weight
    values = [site.activation.sqnr_db for site in report.sites]
    assert values == sorted(values)
    assert sum(site.float_share for site in report.sites) <= 1 + 1e-9
    int8 = sum(site.quantized_share for site in report.sites) + report.conversion_share
    assert 0.5 < int8 <= 1 + 1e-9


def test_dynamic_sites_are_compared_with_their_weights():
    dynamic = recipe(
        '[qconfig.dynamic]\nweight = "weight"\nactivation = "dynamic"\n'
        '[tensor.dynamic]\ndtype = "uint8"\nis_dynamic = true\n[rules]\nglobal = "dynamic"\n'
        '[rules.module_type]\n"torch.nn.LSTM" = "dynamic"\n[tensor.weight]\n'
        'observer = "minmax"\nqscheme = "per_tensor_symmetric"\n'
    )
    model, converted, batches = quantized("recurrent", dynamic)
    report = by_name(qrecipe.compare(model, converted, batches, progress=silent))
    assert report["lstm"].weight is not None
    assert 30 < report["lstm"].weight.sqnr_db < 60
    assert 20 < report["lstm"].activation.sqnr_db < 60


def test_a_model_that_cannot_be_traced_is_compared_module_by_module():
    model, batches = UNTRACEABLE.model(), UNTRACEABLE.batches(3)
    head = 'format = 1\nextends = "builtin:x86-dynamic"\n[lint]\nignore = ["QR210", "QR201"]\n'
    rules = qrecipe.parse_recipe(head)
    converted = qrecipe.quantize(model, rules, batches, progress=silent)
    report = qrecipe.compare(model, converted, batches, progress=silent)
    found = by_name(report)
    assert {name for name, site in found.items() if site.weight} == {
        "attention.qkv",
        "attention.out",
        "head",
    }
    assert found["embed"].activation.exact
    with torch.no_grad():
        outputs = [torch.cat([net(batch) for batch in batches]) for net in (model, converted)]
    assert report.output.sqnr_db == pytest.approx(sqnr_db(*outputs), abs=1e-4)
    assert sum(site.quantized_share for site in report.sites) == pytest.approx(1)


def test_equal_tensors_are_exact_in_json():
    model = net_of(lambda self, x: self.fc(self.keep(x)), keep=nn.ReLU(), fc=nn.Linear(6, 3))
    batches = [torch.randn(4, 6) for _ in range(10)]
    left = recipe('[rules.module_name]\nkeep = "float"\n')
    converted = qrecipe.quantize(model, left, batches, progress=silent)
    report = qrecipe.compare(model, converted, batches, progress=silent)
    document = json.loads(report.to_json())
    kept = next(site for site in document["sites"] if site["name"] == "keep")
    assert kept["activation"] == {"sqnr_db": None, "mse": 0.0, "exact": True}
    assert kept["weight"] is None
    assert document["output"]["exact"] is False
    assert "exact" in str(report)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: self.fc(x), "output: equal in every value over 10 batches"),
        (lambda self, x: self.fc(x).argmax(1), "output: no floating tensor over 10 batches"),
    ],
)
def test_an_output_without_a_number_of_decibels_is_told_in_words(forward, words):
    model = net_of(forward, fc=nn.Linear(6, 3))
    batches = [torch.randn(4, 6) for _ in range(10)]
    floating = qrecipe.parse_recipe('format = 1\nbackend = "x86"\n[rules]\nglobal = "float"\n')
    converted = qrecipe.quantize(model, floating, batches, progress=silent)
    report = qrecipe.compare(model, converted, batches, progress=silent)
    (summary,) = (line for line in str(report).splitlines() if line.startswith("output: "))
    assert summary == words
    page = comparison_page(report, "nothing is static", qrecipe.provenance(converted), {})
    assert page.sections[0].paragraphs[0] == summary


def test_changes_in_place_do_not_reach_what_is_compared():
    model = net_of(
        lambda self, x: self.fc2(torch.relu_(self.fc1(x) + 0).mul_(2)),
        fc1=nn.Linear(6, 6),
        fc2=nn.Linear(6, 3),
    )
    batches = [torch.randn(4, 6) for _ in range(10)]
    left = recipe('[rules]\nglobal = "float"\n[rules.module_name]\nfc1 = "int8"\n')
    converted = qrecipe.quantize(model, left, batches, progress=silent)
    sites = by_name(qrecipe.compare(model, converted, batches, progress=silent))
    error = {name: site.activation.mse for name, site in sites.items()}
    assert error[":mul"] == pytest.approx(4 * error[":relu"], rel=1e-6)
    assert error["fc1"] > 2 * error[":relu"]


def test_roots_are_compared_inside_and_the_output_is_the_whole_models():
    torch.manual_seed(0)
    model = Routed().eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(10)]
    converted = qrecipe.quantize(
        model, recipe_of_roots(["backbone", "head"]), batches, progress=silent
    )
    report = qrecipe.compare(model, converted, batches[:1], progress=silent)
    assert {site.name for site in report.sites} >= {"backbone.conv", "head.fc1", "head.fc2"}
    with torch.no_grad():
        expected = output_sqnr_db(model(batches[0]), converted(batches[0]))
    assert report.output.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_forward_takes_batches_with_labels():
    model, converted, batches = quantized("mlp")
    labelled = [(batch, torch.zeros(8)) for batch in batches]
    plain = qrecipe.compare(model, converted, batches, progress=silent)
    report = qrecipe.compare(
        model, converted, labelled, forward=lambda net, batch: net(batch[0]), progress=silent
    )
    assert report.output == plain.output
    with pytest.raises(CalibrationError, match="QR402"):
        qrecipe.compare(model, converted, labelled, progress=silent)
    with pytest.raises(CalibrationError, match="QR401"):
        qrecipe.compare(model, converted, [], progress=silent)


def test_nothing_is_compared_while_models_are_only_timed(monkeypatch):
    net = NETS["mlp"]
    model, batches = net.model(), net.batches()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    added = []
    monkeypatch.setattr(Totals, "add", lambda totals, *pair: added.append(pair))
    report = qrecipe.compare(model, converted, batches[:1], progress=silent)
    weights = sum(site.weight is not None for site in report.sites)
    activations = sum(site.activation is not None for site in report.sites)
    assert len(added) <= 2 * len(report.sites) + 1
    assert len(added) >= weights + activations


def test_models_stay_as_they_were_and_a_copy_compares_alike():
    model, converted, batches = quantized("in_place")
    with torch.no_grad():
        before = [net(batches[0]) for net in (model, converted)]
    report = qrecipe.compare(model, copy.deepcopy(converted), batches, progress=silent)
    assert qrecipe.compare(model, converted, batches, progress=silent).output == report.output
    with torch.no_grad():
        after = [net(batches[0]) for net in (model, converted)]
    assert all(map(torch.equal, before, after))


def test_what_qrecipe_did_not_convert_from_this_model_is_refused():
    model, converted, batches = quantized("mlp")
    with pytest.raises(ArtifactError, match="QR501"):
        qrecipe.compare(model, model, batches)
    other = net_of(lambda self, x: self.only(x), only=nn.Linear(6, 6))
    with pytest.raises(ArtifactError, match="QR420") as caught:
        qrecipe.compare(other, converted, batches)
    assert "fc1" in str(caught.value) or "only" in str(caught.value)


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_a_reference_with_a_layer_of_another_width_is_refused(layer):
    model, converted, batches = quantized("mlp")
    other = copy.deepcopy(model)
    old = other.get_submodule(layer)
    setattr(other, layer, nn.Linear(old.in_features, old.out_features + 2))
    if layer == "fc1":
        other.fc2 = nn.Linear(old.out_features + 2, other.fc2.out_features)
    with pytest.raises(ArtifactError, match=f"QR420 .* the weights of {layer} have the shapes"):
        qrecipe.compare(other.eval(), converted, batches, progress=silent)


def test_a_layer_of_another_width_is_refused_in_a_model_that_cannot_be_traced():
    model, batches = UNTRACEABLE.model(), UNTRACEABLE.batches(3)
    head = 'format = 1\nextends = "builtin:x86-dynamic"\n[lint]\nignore = ["QR210", "QR201"]\n'
    rules = qrecipe.parse_recipe(head)
    converted = qrecipe.quantize(model, rules, batches, progress=silent)
    other = copy.deepcopy(model)
    other.head = nn.Linear(model.head.in_features, model.head.out_features + 1)
    with pytest.raises(ArtifactError, match=r"QR420 .* the weights of head have the shapes"):
        qrecipe.compare(other, converted, batches, progress=silent)


def test_plots_are_written_or_say_why_not(tmp_path, monkeypatch):
    model, converted, batches = quantized("mlp")
    report = qrecipe.compare(model, converted, batches[:1], progress=silent)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(QRecipeError, match=r"QR421 .*: no such file or directory\n"):
        report.plot(tmp_path / "nowhere" / "report.png")
    with pytest.raises(QRecipeError, match="QR421"):
        report.plot(tmp_path / "report.txt")
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(QRecipeError, match=r"QR602 .*pip install 'qrecipe\[report\]'"):
        report.plot(tmp_path / "again.png")


def test_totals_of_odd_values():
    nan, none, zero = Totals(), Totals(), Totals()
    nan.add(torch.ones(2), torch.ones(3))
    none.add(torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long))
    zero.add(torch.zeros(2), torch.ones(2))
    assert math.isnan(nan.fidelity().sqnr_db)
    assert math.isnan(nan.fidelity().mse)
    assert nan.fidelity().to_json()["exact"] is False
    assert none.fidelity() is None
    assert zero.fidelity().sqnr_db == -math.inf
    worst = Totals()
    worst.add([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.tensor([1.0, 1.1])])
    assert worst.fidelity().sqnr_db == pytest.approx(20 * math.log10(2**0.5 / 0.1), abs=1e-3)
