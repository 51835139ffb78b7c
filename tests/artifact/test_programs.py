"""Programs of PT2E as stored models."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from artifacts import parts
from forgery import forge, put
from nets import NETS
from plans import net_of, recipe
from torch import nn

import qrecipe
from qrecipe.errors.findings import ArtifactError, AuditError, PlanError

pytest.importorskip("torchao")

NET = NETS["squeeze_excite"]
EXECUTED = recipe(base="builtin:x86-static-minmax", head='executor = "pt2e"')


@pytest.fixture(scope="module")
def converted():
    return qrecipe.quantize(NET.model(), EXECUTED, NET.batches(10))


@pytest.fixture
def file(converted, tmp_path):
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture(scope="module")
def pt2(converted, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    qrecipe.export_pt2(converted, path, NET.batches(1)[0])
    return path


def test_a_program_is_loaded_bit_by_bit(converted, file):
    loaded = qrecipe.load_quantized(file, NET.model())
    x = NET.batches(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
        assert loaded(torch.cat([x, x, x])).shape[0] == 3 * len(x)
    assert qrecipe.provenance(loaded).plan == qrecipe.provenance(converted).plan
    assert loaded.code == converted.code


def test_the_file_holds_integers_and_no_float_twins(converted, file):
    weights = sum(p.numel() for p in NET.model().parameters() if p.dim() > 1)
    tensors, _, _ = parts(file)
    sizes = dict.fromkeys(("I8", "F32"), 0)
    for entry in tensors.values():
        if entry.dtype in sizes:
            begin, end = entry.data_offsets
            sizes[entry.dtype] += end - begin
    assert sizes["I8"] == weights
    assert sizes["F32"] < 4 * weights


def test_containers_and_constants_are_those_of_the_example(tmp_path):
    def make():
        return net_of(
            lambda self, pair, twice=False: {"y": self.fc(pair["x"]) * (2 if twice else 1)},
            fc=nn.Linear(6, 4),
        )

    model, batch = make(), {"pair": {"x": torch.randn(1, 6)}, "twice": True}
    converted = qrecipe.quantize(model, EXECUTED, [batch] * 10)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    constants = {"twice": True}
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", make(), constants=constants)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)["y"], converted(**batch)["y"])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("conv2d_scale", torch.tensor(-1.0), "a scale that is not positive"),
        pytest.param(
            "x_zero_point",
            torch.tensor(1000),
            "a zero point outside 0..255",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_impossible_scales_are_refused(file, name, value, text):
    tensors, metadata, content = parts(file)
    content = bytearray(content)
    put(content, tensors[name], value)
    forge(file, tensors, metadata, content)
    with pytest.raises(ArtifactError, match=f"QR509(?s:.)*{text} in {name}"):
        qrecipe.load_quantized(file, NET.model())


def test_a_program_of_another_model_is_refused(file):
    with pytest.raises(ArtifactError, match="QR507"):
        qrecipe.load_quantized(file, NETS["depthwise"].model())


def test_a_file_of_torch_export_gives_the_same_bits(converted, pt2):
    x, program = NET.batches(1)[0], torch.export.load(pt2)
    module = program.module()
    with torch.no_grad():
        for batch in (x, torch.cat([x, x, x])):
            assert torch.equal(module(batch), converted(batch))
    stored = {**program.state_dict, **program.constants}
    weights = [tensor for tensor in stored.values() if tensor.dim() > 1]
    assert {tensor.dtype for tensor in weights} == {torch.int8}


@pytest.mark.parametrize(
    ("width", "depth", "most"),
    [(512, 2, 1.01), pytest.param(64, 12, 1.1, marks=pytest.mark.slow)],
)
def test_a_file_of_torch_export_is_little_larger_than_the_stored_model(
    width, depth, most, tmp_path
):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(64, width)
    converted = qrecipe.quantize(model, EXECUTED, [x] * 10)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    qrecipe.export_pt2(converted, tmp_path / "net.pt2", x)
    stored, exported = ((tmp_path / name).stat().st_size for name in ("net.safetensors", "net.pt2"))
    assert stored < exported < most * stored
    program = torch.export.load(tmp_path / "net.pt2")
    program.example_inputs = ((x,), {})  # as compilers want them


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    converted = qrecipe.quantize(model, EXECUTED, [x] * 10)
    with pytest.raises(PlanError, match="QR307"):
        qrecipe.export_pt2(converted, tmp_path / "net.pt2", {"y": x})
    with pytest.raises(ArtifactError, match=r"QR512 inputs of other shapes(?s:.)*pass inputs"):
        qrecipe.export_pt2(converted, tmp_path / "net.pt2", torch.randn(2, 5))


def test_dynamic_sites_are_not_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    compiled = qrecipe.compile(model, "builtin:x86-dynamic", x, executor="pt2e")
    with pytest.raises(ArtifactError, match="QR512 dynamic sites cannot be exported: 0"):
        qrecipe.export_onnx(compiled, compiled.prepare(), tmp_path / "net.onnx")


def test_a_model_whose_tied_weights_are_separate_is_refused(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
        model[2].weight = model[0].weight
        return model

    converted = qrecipe.quantize(tied(), EXECUTED, [torch.randn(2, 4)] * 10)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    model = tied()
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ArtifactError, match=r"QR507(?s:.)*tied no longer are"):
        qrecipe.load_quantized(tmp_path / "net.safetensors", model)


def test_only_programs_are_written():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    traced = qrecipe.quantize(model, EXECUTED, [x] * 10, executor="fx")
    with pytest.raises(ArtifactError, match=r'QR512(?s:.)*executor = "pt2e"'):
        qrecipe.export_pt2(traced, "net.pt2", x)
    with pytest.raises(ArtifactError, match="QR501"):
        qrecipe.export_pt2(model, "net.pt2", x)


def test_a_file_that_computes_something_else_is_not_written(converted, tmp_path, monkeypatch):
    path, x = tmp_path / "net.pt2", NET.batches(1)[0]
    other = torch.export.export(NET.model(), (x,))
    monkeypatch.setattr(torch.export, "load", lambda stream: other)
    with pytest.raises(AuditError, match="QR414"):
        qrecipe.export_pt2(converted, path, x)
    assert not path.exists()


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


def test_a_class_that_torch_cannot_store_is_an_error_with_advice(tmp_path):
    model = net_of(lambda self, x: Pair(self.fc(x), x), fc=nn.Linear(6, 4))
    x = torch.randn(3, 6)
    converted = qrecipe.quantize(model, EXECUTED, [x] * 10)
    assert isinstance(converted(x), Pair)
    with pytest.raises(ArtifactError, match=r"QR512(?s:.)*namedtuple(?s:.)*return tuples, lists"):
        qrecipe.export_pt2(converted, tmp_path / "net.pt2", x)
    assert not (tmp_path / "net.pt2").exists()


@pytest.mark.slow
def test_a_program_is_loaded_in_a_fresh_process(converted, file, tmp_path):
    x = NET.batches(1)[0]
    with torch.no_grad():
        torch.save((x, converted(x)), tmp_path / "expected.pt")
    code = f"""
import sys, torch, qrecipe
sys.path[:0] = {sys.path!r}
from nets import NETS
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
loaded = qrecipe.load_quantized({str(file)!r}, NETS["squeeze_excite"].model())
with torch.no_grad():
    sys.exit(not torch.equal(loaded(x), expected))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_a_file_of_torch_export_needs_torch_alone(converted, pt2, tmp_path):
    x = NET.batches(1)[0]
    with torch.no_grad():
        torch.save((x, converted(x)), tmp_path / "expected.pt")
    code = f"""
import sys, torch
import torch.ao.quantization.fx._decomposed
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
program = torch.export.load({str(pt2)!r}).module()
with torch.no_grad():
    same = torch.equal(program(x), expected)
sys.exit(not same or "torchao" in sys.modules or "qrecipe" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
