"""Sites whose inputs are rounded and whose results stay float."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import SchemaError, UnsupportedError

pytest.importorskip("torchao")

from qrecipe.execution.pt2e.structure import is_quantize, structure_findings


class Residual(nn.Module):
    """A block of a transformer without its attention: what its layers give is read as float."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Residual() for _ in range(3)])
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.blocks(x).flatten(1, 2).unflatten(1, (-1, 32)))


def stack():
    torch.default_generator.manual_seed(0)
    return Stack().eval(), [torch.randn(4, 3, 32) for _ in range(10)]


def recipe(activation="inputs_only = true", *, executor="pt2e", phase="ptq"):
    return qrecipe.parse_recipe(f"""
format = 1
extends = "builtin:x86-static-minmax"
executor = "{executor}"
phase = "{phase}"
[tensor.activation]
{activation}
[rules.module_type]
"torch.nn.LayerNorm" = "float"
[rules.function]
"torch.add" = "float"
""")


@pytest.fixture(scope="module")
def quantized():
    model, batches = stack()
    return model, batches, qrecipe.quantize(model, recipe(), batches)


def rounded(x, scale, zero_point):
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 127)


def test_a_layer_computes_with_rounded_inputs_and_gives_what_it_computes():
    torch.default_generator.manual_seed(0)
    layer, batches = nn.Linear(16, 4).eval(), [torch.randn(4, 16) for _ in range(10)]
    converted = qrecipe.quantize(layer, recipe(), batches)
    low, high = min(b.min() for b in batches), max(b.max() for b in batches)
    scale = float((high - low) / 127)
    x = rounded(batches[0], scale, round(-float(low) / scale))
    steps = (layer.weight.abs().amax(1) / 127.5).detach()
    zeros = torch.zeros(4, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(layer.weight, steps, zeros, 0, -128, 127)
    torch.testing.assert_close(converted(batches[0]), F.linear(x, weight, layer.bias))


def test_only_what_layers_read_is_quantized(quantized):
    _, _, converted = quantized
    quantizing = [node for node in converted.graph.nodes if is_quantize(node)]
    assert len(quantizing) == 7  # of which each is read by one of the seven layers
    plan = qrecipe.plan(*stack_and_batch())
    assert plan.boundaries == 7
    assert not any(site.gives_integers for site in plan)


def stack_and_batch():
    model, batches = stack()
    return model, recipe(), batches[0]


def test_the_plan_says_so_and_what_follows_is_float():
    plan = qrecipe.plan(*stack_and_batch())
    assert plan["blocks.0.wide"].verdict == "quantized"
    assert plan["blocks.0.wide"].reason == "its result stays float"
    model = nn.Sequential(nn.Linear(8, 8), nn.MaxPool1d(2), nn.Linear(4, 8)).eval()
    plan = qrecipe.plan(model, recipe(), torch.rand(4, 8))
    assert plan["1"].reason == "follows 0, which returns float"


def test_it_is_closer_to_float_where_float_reads_the_results(quantized):
    model, batches, converted = quantized
    as_usual = qrecipe.quantize(model, recipe("inputs_only = false"), batches)
    with torch.no_grad():
        expected = model(batches[0])
        gain = output_sqnr_db(expected, converted(batches[0])) - output_sqnr_db(
            expected, as_usual(batches[0])
        )
    assert gain > 1


def test_it_is_stored_and_loaded(quantized, tmp_path):
    model, batches, converted = quantized
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), converted(batches[0]))


def test_drift_and_comparisons_know_the_inputs(quantized):
    model, batches, converted = quantized
    report = qrecipe.drift(converted, batches)
    assert len(report.sites) == 7
    assert {site.tensor for site in report.sites} == {"input"}
    assert report.drifted() == ()
    compared = qrecipe.compare(model, converted, batches)
    assert compared.output.sqnr_db > 25


@pytest.mark.slow
def test_a_file_of_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    model, batches = stack()
    compiled = qrecipe.compile(model, recipe(), batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches)
    qrecipe.export_onnx(compiled, prepared, tmp_path / "model.onnx")  # compares outputs


def test_a_result_that_was_rounded_nevertheless_is_found():
    model, batches = stack()
    compiled = qrecipe.compile(model, recipe("inputs_only = false"), batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches)
    (part,) = compiled._parts
    plan = qrecipe.plan(model, recipe(), batches[0])
    found = [*structure_findings(plan, part.program, compiled.convert(prepared))]
    assert any("which was rounded" in finding.message for finding in found)


@pytest.mark.parametrize("asked", [{"executor": "fx"}, {"phase": "qat"}])
def test_what_rounds_all_results_refuses_it(asked):
    model, batches = stack()
    with pytest.raises(UnsupportedError, match="QR303") as caught:
        qrecipe.compile(model, recipe(**asked), batches[0])
    why = 'only executor = "pt2e" without training leaves results float'
    assert why in str(caught.value)


def test_weights_and_dynamic_tensors_do_not_have_it():
    weight = "[tensor.weight]\ninputs_only = true\n"
    with pytest.raises(SchemaError, match="inputs_only, which is for activations only"):
        qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-static"\n{weight}')
    activation = "[tensor.activation]\ninputs_only = true\n"
    with pytest.raises(SchemaError, match='a dynamic tensor takes no "inputs_only"'):
        qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-dynamic"\n{activation}')
