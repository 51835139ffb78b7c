"""The audit can fail: each sabotage is found, and its site is named."""

from __future__ import annotations

import sys

import pytest
import torch
from nets import NETS
from runs import HEAD, STATIC, float_at, silent
from torch import fx, nn
from torch.ao.nn import quantized as nnq

import qrecipe
from qrecipe.errors.findings import AuditError
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.structure import structure_findings
from qrecipe.model.addresses import site_of

# --- the audit can fail


@pytest.fixture
def sabotaged(monkeypatch):
    """Quantize a toy net while something goes wrong in lowering; returns the audit's findings."""

    def run(name, sabotage, recipe=STATIC):
        honest = execution.lowered

        def lowered(*args, **kwargs):
            converted = honest(*args, **kwargs)
            sabotage(converted)
            return converted

        monkeypatch.setattr(execution, "lowered", lowered)
        net = NETS[name]
        with pytest.raises(AuditError) as caught:
            qrecipe.quantize(net.model(), recipe, net.batches(), progress=silent)
        return caught.value.findings

    return run


def test_an_honest_conversion_passes_the_same_road(monkeypatch):
    calls = []
    honest = execution.lowered
    monkeypatch.setattr(execution, "lowered", lambda *a, **k: calls.append(1) or honest(*a, **k))
    net = NETS["mlp"]
    qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    assert calls == [1]


def test_a_float_module_in_the_place_of_a_quantized_one_is_found(sabotaged):
    findings = sabotaged("mlp", lambda model: setattr(model, "fc2", nn.Linear(16, 4)))
    assert [f.code for f in findings] == ["QR410"]
    assert "fc2" in findings[0].message
    assert findings[0].location is not None


def test_a_quantized_module_in_the_place_of_a_float_one_is_found(sabotaged):
    def sabotage(model):
        model.fc2 = nnq.Linear(16, 4)

    findings = sabotaged("mlp", sabotage, float_at(["fc2"]))
    assert "QR410" in {f.code for f in findings}
    assert any("fc2" in f.message for f in findings)


def test_a_site_that_vanished_is_found(sabotaged):
    def sabotage(model):
        for node in list(model.graph.nodes):
            if site_of(node) == "act":
                node.replace_all_uses_with(node.args[0])
                model.graph.erase_node(node)
        model.recompile()

    findings = sabotaged("squeeze_excite", sabotage)
    assert any("act" in f.message and "vanished" in f.message for f in findings)


def _requantized(module, change):
    weight, bias = module._weight_bias()
    changed = change(weight.dequantize())
    module.set_weight_bias(
        torch.quantize_per_channel(
            changed,
            weight.q_per_channel_scales(),
            weight.q_per_channel_zero_points(),
            0,
            torch.qint8,
        ),
        bias,
    )


def test_a_changed_weight_is_found_and_its_site_named(sabotaged):
    findings = sabotaged("mlp", lambda model: _requantized(model.fc1, lambda w: w.flip(0)))
    assert {f.code for f in findings} <= {"QR411", "QR412"}
    assert any("fc1" in f.message for f in findings)
    assert not any("fc2" in f.message for f in findings)


def test_a_changed_bias_is_found_and_its_site_named(sabotaged):
    def sabotage(model):
        module = model.get_submodule("layer1.0.conv2")
        weight, bias = module._weight_bias()
        module.set_weight_bias(weight, bias.detach() + 1.0)

    findings = sabotaged("residual", sabotage)
    assert any("layer1.0.conv2" in f.message for f in findings)


def test_a_changed_output_scale_is_found(sabotaged):
    def sabotage(model):
        model.fc1.scale *= 0.2

    findings = sabotaged("mlp", sabotage)
    assert any("fc1" in f.message for f in findings)


@pytest.mark.parametrize(("name", "path"), [("mlp", "fc1"), ("residual", "layer1.0.conv2")])
def test_weights_of_another_dtype_or_scheme_are_found(sabotaged, name, path):
    def sabotage(model):
        module = model.get_submodule(path)
        weight, bias = module._weight_bias()
        module.set_weight_bias(
            torch.quantize_per_tensor(weight.dequantize(), 0.01, 0, torch.qint8), bias
        )

    findings = sabotaged(name, sabotage)
    assert [f.code for f in findings] == ["QR410"]
    assert path in findings[0].message


def test_weights_that_are_packed_by_another_scheme_are_found(sabotaged, monkeypatch):
    def per_tensor(weight, *_):
        return torch.quantize_per_tensor(weight, 0.01, 0, torch.qint8)

    monkeypatch.setattr(execution, "quantized_per_channel", per_tensor)
    findings = sabotaged("residual", lambda model: None)
    assert {f.code for f in findings} == {"QR410"}
    assert all("has torch.per_tensor_affine weights" in f.message for f in findings)


def test_a_model_that_fails_when_it_runs_is_an_error_of_the_audit(sabotaged):
    findings = sabotaged("mlp", lambda model: setattr(model, "fc2", nnq.Linear(15, 4)))
    assert all(f.code.startswith("QR4") for f in findings)


class Wrong(nn.Module):
    """One operation with a kernel that is known to be wrong, between two right ones."""

    def __init__(self, layer):
        super().__init__()
        self.first = nn.Conv2d(3, layer.in_channels, 1)
        self.suspect = layer

    def forward(self, x):
        return self.suspect(self.first(x))


def test_a_wrong_kernel_that_nobody_refused_is_found_and_named(monkeypatch):
    monkeypatch.setattr("qrecipe.planning.backend.detour", lambda *args: None)
    model = Wrong(nn.ConvTranspose2d(8, 16, 2, stride=2)).eval()  # on any CPU
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(model, STATIC, NETS["residual"].batches(), progress=silent)
    (finding,) = caught.value.findings
    assert finding.code == "QR411"
    assert "suspect" in finding.message
    assert "suspect" in finding.hint


COARSE_BITS = """
[tensor.coarse]
observer = "minmax"
dtype = "uint8"
qscheme = "per_tensor_affine"
quant_min = 0
quant_max = 3
[qconfig.coarse]
weight = "weight"
activation = "coarse"
[rules]
global = "coarse"
"""


def test_a_scheme_that_is_too_coarse_warns_and_blames_no_kernel():
    net = NETS["residual"]
    with pytest.warns(qrecipe.QRecipeWarning, match="QR203"):
        qrecipe.quantize(
            net.model(), qrecipe.parse_recipe(HEAD + COARSE_BITS), net.batches(), progress=silent
        )


def test_a_recipe_that_accepts_a_coarse_scheme_is_not_warned():
    net = NETS["residual"]
    accepting = qrecipe.parse_recipe(f'{HEAD}[lint]\nignore = ["QR203"]\n{COARSE_BITS}')
    qrecipe.quantize(net.model(), accepting, net.batches(), progress=silent)


def test_a_site_that_was_converted_without_a_plan_is_found():
    net = NETS["mlp"]
    compiled = qrecipe.compile(net.model(), STATIC, net.batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, net.batches(), progress=silent)
    converted = compiled.convert(prepared)
    assert list(structure_findings(compiled.plan, converted)) == []
    known = {site.name for site in compiled.plan.sites} - {"fc2"}
    (finding,) = structure_findings(compiled.plan.restricted_to(known), converted)
    assert finding.code == "QR410"
    assert finding.message == "fc2 was converted, but is not in the plan"


def test_what_lowering_changes_between_kernels_is_an_error_although_every_kernel_is_right(
    monkeypatch,
):
    lower = execution.lower_to_native_backend

    def negate(*args):
        lowered = lower(*args)
        output = lowered.graph.output_node()
        with lowered.graph.inserting_before(output):
            output.args = (lowered.graph.call_function(torch.neg, (output.args[0],)),)
        lowered.recompile()
        return lowered

    monkeypatch.setattr(execution, "lower_to_native_backend", negate)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(16, 8) for _ in range(12)]
    with pytest.raises(AuditError, match=r"QR412 .* although all kernels agree"):
        qrecipe.quantize(model, "builtin:x86-static", batches)


# --- what conversion itself does to the graph


def negated(graph_module):
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    with graph_module.graph.inserting_before(output):
        output.replace_input_with(
            output.args[0], graph_module.graph.call_function(torch.neg, (output.args[0],))
        )
    graph_module.recompile()


def without_relus(graph_module):
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "act":
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


@pytest.mark.parametrize("change", [negated, without_relus])
@pytest.mark.parametrize("text", ["", 'backend = "executorch"', 'phase = "qat"'])
def test_what_conversion_does_beside_rounding_is_found_though_the_reference_shares_it(
    monkeypatch, change, text
):
    honest = execution.convert

    def faulty(*args, **kwargs):
        converted = honest(*args, **kwargs)
        change(converted)
        return converted

    monkeypatch.setattr(execution, "convert", faulty)
    model = nn.Sequential()
    for name, layer in (("one", nn.Linear(8, 16)), ("act", nn.ELU()), ("two", nn.Linear(16, 4))):
        model.add_module(name, layer)
    batches = [torch.randn(8, 8) for _ in range(12)]
    compiled = qrecipe.compile(model.eval(), qrecipe.parse_recipe(f"{text}\n{HEAD}"), batches[0])
    prepared = compiled.prepare()
    for batch in batches:
        prepared(batch)
    with pytest.raises(AuditError, match="QR412 torch's conversion changed more than the rounding"):
        compiled.convert(prepared)


def quantized_with(monkeypatch, function):
    """Quantize while conversion puts a function behind the model."""
    honest = execution.convert

    def faulty(*args, **kwargs):
        converted = honest(*args, **kwargs)
        (output,) = [node for node in converted.graph.nodes if node.op == "output"]
        with converted.graph.inserting_before(output):
            result = converted.graph.call_function(function, (output.args[0],))
        output.replace_input_with(output.args[0], result)
        converted.recompile()
        return converted

    monkeypatch.setattr(execution, "convert", faulty)
    net = NETS["mlp"]
    return qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)


def test_a_conversion_that_fails_without_its_rounding_alone_is_found(monkeypatch):
    def picky(x):
        if sys._getframe(1).f_code is fx.Interpreter.call_function.__code__:  # runs unrounded
            raise RuntimeError("out of order")
        return x

    with pytest.raises(AuditError, match=r"QR412 .*: without rounding it fails: out of order"):
        quantized_with(monkeypatch, picky)


def test_a_conversion_that_fails_is_told_as_that(monkeypatch):
    def broken(x):
        raise RuntimeError("out of order")

    with pytest.raises(AuditError, match=r"QR413 the reference fails .*: out of order"):
        quantized_with(monkeypatch, broken)
