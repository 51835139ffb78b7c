"""Weight-only, dynamic and mixed rules on programs of torch.export, and their audit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from differential import snapshot
from plans import net_of, recipe, sites
from programs import QCONFIGS, of_site, tamper_with_conversion
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.authoring.lock.check import check_lock
from qrecipe.authoring.lock.file import write_lock
from qrecipe.errors.findings import AuditError, ExecutionError, UnsupportedError

pytest.importorskip("torchao")


class Mixed(nn.Module):
    """A convolution, and linear layers of which one is a function."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up, self.down = nn.Linear(36, 16), nn.Linear(16, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = torch.tanh(self.up(torch.relu(self.conv(x)).flatten(1)))
        return F.linear(torch.relu(self.down(x)), self.weight)


def mixed():
    torch.manual_seed(0)
    return Mixed().eval(), [torch.randn(4, 3, 5, 5) for _ in range(10)]


def rules(default="float", **named):
    lines = "".join(f'"{name.replace("__", ":")}" = "{value}"\n' for name, value in named.items())
    text = f'{QCONFIGS}\n[rules]\nglobal = "{default}"\n[rules.module_name]\n{lines}'
    return recipe(text, base="builtin:x86-static-minmax", head='executor = "pt2e"')


MODES = {
    "weight_only": rules("only"),
    "dynamic": rules(up="dynamic", down="dynamic", __linear="dynamic"),
    "mixed": rules("int8", up="dynamic", down="only", __linear="only"),
}


@pytest.fixture(scope="module", params=MODES)
def quantized(request):
    model, batches = mixed()
    before = snapshot(model)
    given = batches if request.param == "mixed" else None
    converted = qrecipe.quantize(model, MODES[request.param], given, example_inputs=batches[0])
    assert snapshot(model) == before
    return request.param, model, batches, converted


def test_each_mode_is_a_good_citizen(quantized):
    mode, model, batches, converted = quantized
    with torch.no_grad():
        expected = converted.eval()(batches[0])
        assert output_sqnr_db(model(batches[0]), expected) > 30
        assert torch.equal(copy.deepcopy(converted)(batches[0]), expected)
        assert converted(torch.randn(7, 3, 5, 5)).shape == (7, 6)
        found = []
        thread = threading.Thread(target=lambda: found.append(converted(batches[0])))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    state = converted.state_dict()
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in state.values())
    in_float = [t for t in state.values() if t.is_floating_point() and t.dim() > 1]
    assert len(in_float) == (1 if mode == "dynamic" else 0)
    read = {str(node.target) for node in converted.graph.find_nodes(op="get_attr")}
    assert set(state) <= read


def test_each_mode_is_stored_bit_by_bit(quantized, tmp_path):
    _, model, batches, converted = quantized
    qrecipe.save_quantized(converted, tmp_path / "m.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), converted(batches[0]))


def test_weights_alone_are_rounded_and_take_a_quarter():
    model, batches = mixed()
    converted = qrecipe.quantize(model, rules(up="only"), example_inputs=batches[0])
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        weight = rounded.up.weight
        scale, zero = weight.abs().amax(1) / 127.5, torch.zeros(16, dtype=torch.int32)
        weight.copy_(torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127))
        assert output_sqnr_db(rounded(batches[0]), converted(batches[0])) > 100
    integers, zeros = (t for t in converted.state_dict().values() if t.dtype == torch.int8)
    if integers.dim() == 1:
        integers, zeros = zeros, integers
    assert integers.nbytes * 4 == model.up.weight.nbytes
    assert zeros.tolist() == [0] * 16  # in 64 bits, a call takes three times as long


def test_a_weight_that_another_mode_reads_too_is_as_its_kernels_take_it():
    tied = net_of(lambda self, x: self.b(self.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    tied.b.weight = tied.a.weight
    x = torch.randn(4, 6)
    converted = qrecipe.quantize(tied, rules(a="only", b="dynamic"), example_inputs=x)
    dtypes = {t.dtype for t in converted.state_dict().values() if not t.is_floating_point()}
    assert dtypes == {torch.int8, torch.int64}
    assert output_sqnr_db(tied(x), converted(x)) > 30


def test_the_plan_says_what_weight_only_saves_and_fx_names_the_executor_for_it():
    model, batches = mixed()
    plan = qrecipe.plan(model, rules(up="only"), batches[0])
    assert plan["up"].mode == "weight_only"
    assert "a quarter of the memory and is no faster" in plan["up"].reason
    for executor in ("fx", "eager"):
        with pytest.raises(UnsupportedError, match='or weight-only with executor = "pt2e"'):
            qrecipe.plan(model, rules(up="only"), batches[0], executor=executor)


def test_dynamic_layers_compute_what_the_kernels_of_fx_compute():
    model, batches = mixed()
    named = rules(up="dynamic", down="dynamic", __linear="dynamic")
    outputs = [
        qrecipe.quantize(model, named, example_inputs=batches[0], executor=executor)(batches[1])
        for executor in ("fx", "pt2e")
    ]
    assert output_sqnr_db(*outputs) > 35


def test_the_range_of_a_dynamic_layer_is_that_of_the_call():
    model = net_of(lambda self, x: self.fc(x), fc=nn.Linear(6, 4))
    x = torch.randn(4, 6)
    converted = qrecipe.quantize(model, rules(fc="dynamic"), example_inputs=x)
    with torch.no_grad():
        for size in (1e-3, 1.0, 1e3):
            assert (
                output_sqnr_db(model(size * x) - model.fc.bias, converted(size * x) - model.fc.bias)
                > 30
            )


MISSING = {
    "recurrent layers": ("x86-dynamic", nn.LSTM(6, 4, batch_first=True), torch.randn(2, 3, 6)),
    "bags": ("embedding-weight-only", nn.EmbeddingBag(9, 4, mode="sum"), torch.ones(2, 3).long()),
    "float16": ("float16-dynamic", nn.Linear(6, 4), torch.randn(2, 6)),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_it_has_no_operator_for_is_refused_with_the_executors_that_have_a_kernel(what):
    name, layer, x = MISSING[what]
    with pytest.raises(UnsupportedError, match=f"QR303(?s:.)*no {what}.*: FX graph mode and eager"):
        qrecipe.plan(nn.Sequential(layer).eval(), f"builtin:{name}", x, executor="pt2e")


def test_what_measures_works_on_all_modes_or_says_why_not(quantized, tmp_path):
    mode, model, batches, converted = quantized
    compared = {site.name: site for site in qrecipe.compare(model, converted, batches).sites}
    assert compared["up"].weight.sqnr_db > 35
    assert compared["up"].activation.sqnr_db > 25
    if mode == "mixed":
        assert {site.name for site in qrecipe.drift(converted, batches).sites} >= {"conv"}
    else:
        with pytest.raises(ExecutionError, match="QR430"):
            qrecipe.drift(converted, batches)
    ranked = {
        site.name: site.sqnr_db for site in qrecipe.sensitivity(model, MODES[mode], batches).sites
    }
    assert ranked["up"] > 25
    path = tmp_path / "lock.toml"
    plan = qrecipe.plan(model, MODES[mode], batches[0])
    write_lock(plan, path)
    assert not check_lock(plan, path).causes
    assert sites(plan)["conv"].mode == {"weight_only": "weight_only", "mixed": "static"}.get(mode)


# --- the audit finds what is wrong


@pytest.fixture
def tampered(monkeypatch):
    """Quantize with a tampered conversion; what the audit says first."""

    def finding(mode, tamper):
        tamper_with_conversion(monkeypatch, tamper)
        model, batches = mixed()
        with pytest.raises(AuditError) as raised:
            qrecipe.quantize(model, MODES[mode], batches, example_inputs=batches[0])
        return raised.value.findings[0]

    return finding


def test_a_range_of_another_tensor_is_found(tampered):
    def tamper(made):
        quantize = of_site(made, "down").args[0].args[0]
        other = of_site(made, "up").args[0].args[0]
        quantize.args = (quantize.args[0], *other.args[1:])

    found = tampered("dynamic", tamper)
    assert found.code == "QR410"
    assert "is not that of the call" in found.message


def test_a_dynamic_layer_that_reads_float_is_found(tampered):
    def tamper(made):
        node = of_site(made, "down")
        node.update_arg(0, node.args[0].args[0].args[0])

    found = tampered("dynamic", tamper)
    assert "planned as dynamic, but its input is float" in found.message


def test_an_input_that_is_rounded_to_eight_bits_is_found(tampered):
    def tamper(made):
        dequantize = of_site(made, "down").args[0]
        for node in (dequantize, dequantize.args[0]):
            node.update_arg(4, 255)
        chosen = dequantize.args[0].args[1].args[0]
        chosen.update_arg(2, 255)

    assert (
        "its input is rounded to 0..255 per tensor and call" in tampered("dynamic", tamper).message
    )


def test_a_weight_that_stayed_float_is_found(tampered):
    def tamper(made):
        made.own = nn.Parameter(torch.zeros(16, 36))
        node = of_site(made, "up")
        with made.graph.inserting_before(node):
            node.update_arg(1, made.graph.get_attr("own"))

    found = tampered("weight_only", tamper)
    assert "planned as weight_only, but its weight is float" in found.message


def test_weights_of_another_scale_are_found(tampered):
    def tamper(made):
        dequantize = of_site(made, "up").args[1]
        scale = str(dequantize.args[1].target)
        setattr(made, scale, 2 * getattr(made, scale))

    found = tampered("weight_only", tamper)
    assert "the scale is not what was calibrated" in found.message


def test_an_input_that_weight_only_rounds_is_found(tampered):
    def tamper(made):
        node = of_site(made, "up")
        rounding = torch.ops.quantized_decomposed
        with made.graph.inserting_before(node):
            grid = (0.1, 0, -128, 127, torch.int8)
            integers = made.graph.call_function(
                rounding.quantize_per_tensor.default, (node.args[0], *grid)
            )
            given = made.graph.call_function(
                rounding.dequantize_per_tensor.default, (integers, *grid)
            )
        node.update_arg(0, given)

    assert "which was rounded" in tampered("weight_only", tamper).message
