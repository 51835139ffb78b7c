"""Backends that torch has no kernels for give the reference model, to be handed on."""

from __future__ import annotations

import pytest
import torch
from export_recipes import EXECUTORCH, TENSORRT, batches, net
from nets import NETS
from runs import silent
from torch import nn
from torch.ao.nn.quantized.reference import Linear as ReferenceLinear

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import AuditError, UnsupportedError
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx import executor


@pytest.mark.parametrize("text", [EXECUTORCH, TENSORRT], ids=["executorch", "tensorrt"])
def test_the_reference_model_runs_on_float_kernels_and_the_plan_says_what_it_is_for(text):
    model, recipe = net(), qrecipe.parse_recipe(text)
    plan = qrecipe.plan(model, recipe, batches()[0])
    assert plan.is_for_export
    assert "for export" in str(plan)
    converted = qrecipe.quantize(model, recipe, batches(), progress=silent)
    kinds = {type(module).__module__ for module in converted.modules()}
    assert any("quantized.reference" in kind for kind in kinds)
    assert not any("quantized.modules" in kind for kind in kinds)
    assert sqnr_db(model(batches()[0]), converted(batches()[0])) > 25
    assert qrecipe.provenance(converted).fingerprint == recipe.fingerprint


def test_unsigned_activations_are_refused_where_the_backend_takes_none():
    text = TENSORRT.replace(
        'dtype = "int8"\nqscheme = "per_tensor_symmetric"',
        'dtype = "uint8"\nqscheme = "per_tensor_affine"',
    )
    with pytest.raises(UnsupportedError):
        qrecipe.plan(net(), qrecipe.parse_recipe(text), batches()[0])


def reflecting():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=(1, 2), padding_mode="reflect")
    line = nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(2), line).eval()


@pytest.mark.parametrize("phase", ["ptq", "qat"])
@pytest.mark.parametrize("text", [EXECUTORCH, TENSORRT], ids=["executorch", "tensorrt"])
def test_padding_that_reflects_is_a_call_of_its_own_which_reference_convolutions_need(
    text, phase, tmp_path
):
    model, data = reflecting(), batches()
    recipe = qrecipe.parse_recipe(f'phase = "{phase}"\n{text}')
    compiled = qrecipe.compile(model, recipe, data[0])
    prepared = compiled.prepare()
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    converted = compiled.convert(prepared)
    expected = converted(data[0])
    assert sqnr_db(model(data[0]), expected) > 25
    qrecipe.save_quantized(converted, tmp_path / "m.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model)
    assert torch.equal(loaded(data[0]), expected)


def test_torchs_reference_convolution_pads_with_zeros_whatever_its_mode():
    reference = torch.ao.nn.quantized.reference
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    weight = {"qscheme": torch.per_tensor_affine, "dtype": torch.qint8, "scale": 0.01}
    weight["zero_point"] = 0
    made, x = reference.Conv2d.from_float(conv, weight), batches()[0]
    assert sqnr_db(conv(x), made(x)) < 15
    assert sqnr_db(conv(x)[..., 1:-1, 1:-1], made(x)[..., 1:-1, 1:-1]) > 30


# --- the audit


def sabotaged(monkeypatch, change):
    honest = execution.reference

    def wrong(*args):
        reference = honest(*args)
        change(reference)
        reference.recompile()
        return reference

    monkeypatch.setattr(execution, "reference", wrong)


def a_float_module(reference):
    reference.set_submodule("3", nn.Linear(288, 4))


def a_weight_per_tensor(reference):
    module = reference.get_submodule("3")
    module.weight_qscheme = torch.per_tensor_affine
    module.weight_scale, module.weight_zero_point = torch.tensor(0.01), torch.tensor(0)


def a_weight_of_another_dtype(reference):
    reference.get_submodule("3").weight_dtype = torch.quint8


def a_float_result(reference):
    *_, dequantize, output = reference.graph.nodes
    output.replace_input_with(dequantize, dequantize.args[0].args[0])
    reference.graph.eliminate_dead_code()


def a_float_input(reference):
    (node,) = [node for node in reference.graph.nodes if node.target == "3"]
    node.replace_input_with(node.args[0], node.args[0].args[0].args[0])
    reference.graph.eliminate_dead_code()


def another_computation(reference):
    module = reference.get_submodule("3")
    module.weight.data = module.weight.data.roll(1, 0)


@pytest.mark.parametrize("text", [EXECUTORCH, TENSORRT], ids=["executorch", "tensorrt"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (a_float_module, "QR410 3 (Linear) is planned as static, but has float weights"),
        (
            a_weight_per_tensor,
            "QR410 3 (Linear) is planned as static, but has weights quantized per",
        ),
        (
            a_weight_of_another_dtype,
            "QR410 3 (Linear) is planned as static, but has weights of dtype",
        ),
        (a_float_result, "QR410 3 (Linear) is planned as static, but gives a float result"),
        (a_float_input, "QR410 3 (Linear) is planned as static, but takes a float input"),
        (another_computation, "QR411 the reference module of 3 (Linear) computes something else"),
    ],
)
def test_a_reference_model_that_differs_from_the_plan_is_an_error(monkeypatch, text, change, says):
    sabotaged(monkeypatch, change)
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(net(), qrecipe.parse_recipe(text), batches(), progress=silent)
    assert says in str(caught.value)


def test_a_site_that_is_planned_float_and_has_quantized_weights_is_an_error(monkeypatch):
    def and_the_linear(reference):
        module = reference.get_submodule("3")
        scheme = {"qscheme": torch.per_tensor_affine, "dtype": torch.qint8}
        given = {**scheme, "scale": 0.01, "zero_point": 0}
        reference.set_submodule("3", ReferenceLinear.from_float(module, given))

    sabotaged(monkeypatch, and_the_linear)
    recipe = qrecipe.parse_recipe(f'{EXECUTORCH}[rules.module_name]\n"3" = "float"\n')
    with pytest.raises(
        AuditError, match=r"QR410 3 \(Linear\) is planned as float, but has weights of"
    ):
        qrecipe.quantize(net(), recipe, batches(), progress=silent)


def test_the_model_that_is_returned_is_the_one_that_was_audited(monkeypatch):
    seen = []
    honest = executor.audit_reference
    monkeypatch.setattr(
        executor, "audit_reference", lambda *args: seen.append(args[1]) or honest(*args)
    )
    recipe = qrecipe.parse_recipe(EXECUTORCH)
    converted = qrecipe.quantize(net(), recipe, batches(), progress=silent)
    assert [id(model) for model in seen] == [id(converted)]
    assert not any(module._forward_hooks for module in converted.modules())
    assert not any("get_weight" in vars(module) for module in converted.modules())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n != "mlp" else []) for n in NETS]
)
@pytest.mark.parametrize("text", [EXECUTORCH, TENSORRT], ids=["executorch", "tensorrt"])
@pytest.mark.parametrize("phase", ["ptq", "qat"])
# products of products have ranges that ten batches say little about
@pytest.mark.filterwarnings("ignore:QR232:qrecipe.QRecipeWarning")
def test_what_is_right_passes_the_audit(name, text, phase):
    if phase == "qat" and name == "shared_conv_two_norms":
        pytest.skip("one convolution with two BatchNorms cannot be trained")
    a_net = NETS[name]
    recipe = qrecipe.parse_recipe(text.replace("\n", f'\nphase = "{phase}"\n', 1))
    compiled = qrecipe.compile(a_net.model(), recipe, a_net.batches()[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, a_net.batches(), progress=silent)
    compiled.convert(prepared)
