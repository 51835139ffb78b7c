"""What is exported is opened in a fresh process before anybody is told that it is done."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from places import ROOT
from plans import net_of, recipe
from runs import silent
from torch import nn

import qrecipe
from qrecipe.artifact.carried import carried
from qrecipe.artifact.export import judged, targets
from qrecipe.artifact.export.judged import Run, check_reopened
from qrecipe.errors.findings import ArtifactError, AuditError, QRecipeWarning
from qrecipe.model.call import Inputs

pytestmark = pytest.mark.usefixtures("onnx_listed_once")

MINMAX = recipe(base="builtin:x86-static-minmax")


def calibrated(model, executor="fx", shape=(2, 3, 8, 8)):
    batches = [torch.randn(*shape) for _ in range(10)]
    compiled = qrecipe.compile(model, MINMAX, batches[0], executor=executor)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    return targets.Calibrated(compiled, prepared)


@pytest.fixture(scope="module")
def convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    return calibrated(model)


@pytest.fixture(scope="module")
def of_onnx(convolution, tmp_path_factory):
    """The file, written through a link over one that nobody else may read."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx")
    file, link = folder / "net.onnx", folder / "link.onnx"
    file.write_text("former")
    file.chmod(0o640)
    link.symlink_to(file)
    targets.export(convolution, "onnx", link)
    return file


@pytest.fixture(scope="module")
def of_openvino(convolution, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    file = tmp_path_factory.mktemp("openvino") / "net.xml"
    targets.export(convolution, "openvino", file)
    return file


def test_onnx_and_openvino_say_where_they_come_from(convolution, of_onnx, of_openvino):
    assert sorted(path.name for path in of_openvino.parent.iterdir()) == ["net.bin", "net.xml"]
    for file, kind in ((of_onnx, "ONNX"), (of_openvino, "OpenVINO")):
        found = carried(file)
        assert (found.kind, found.checked.plan) == (kind, convolution.compiled.plan)


def test_a_file_of_openvino_has_integers_and_float32_and_takes_any_batch(of_openvino):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().read_model(of_openvino)
    stored = {
        str(op.get_element_type()) for op in model.get_ops() if op.get_type_name() == "Constant"
    }
    assert any("int8" in kind for kind in stored)
    assert not any("float16" in kind for kind in stored)
    assert model.inputs[0].get_partial_shape()[0].is_dynamic


def test_a_file_of_openvino_has_its_suffix(convolution, tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(ArtifactError, match=r"QR502 (?s:.)*ends with \.xml(?s:.)*net\.bin"):
        qrecipe.export_openvino(convolution.compiled, convolution.prepared, tmp_path / "net.onnx")
    with pytest.raises(ArtifactError, match=rf"QR502 .{tmp_path}.*ends with \.xml"):
        targets.export(convolution, "openvino", tmp_path / "net.onnx")


def test_a_runtime_that_dies_is_named_and_nothing_is_written(tmp_path):
    """OpenVINO 2026.4 crashes where it compiles a number that is added to joined tensors."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.last(torch.cat([torch.relu(self.one(x)), self.two(x)], 1) + 1.0),
        one=nn.Conv2d(3, 8, 3),
        two=nn.Conv2d(3, 8, 3),
        last=nn.Conv2d(16, 4, 1),
    )
    with pytest.raises(
        AuditError, match=r"QR413 openvino cannot run .* it was killed by signal \d"
    ):
        targets.export(calibrated(model), "openvino", tmp_path / "net.xml")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_and_one_with_other_results_are_errors(
    convolution, of_onnx, tmp_path
):
    file, x = tmp_path / "net.onnx", convolution.inputs.args[0]
    file.write_bytes(of_onnx.read_bytes())
    with torch.no_grad():
        expected = convolution.converted()(x)
    check_reopened("onnxruntime", file, Run(Inputs((x,)), expected, expected))
    with pytest.raises(AuditError, match=r"QR414 .* in onnxruntime, in a fresh process: "):
        check_reopened("onnxruntime", file, Run(Inputs((x,)), -expected, -expected))
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(AuditError, match=r"QR413 onnxruntime cannot run .*: .*InvalidProtobuf"):
        check_reopened("onnxruntime", file, Run(Inputs((x,)), expected, None))


def test_a_link_is_followed_and_permissions_stay(of_onnx):
    assert of_onnx.with_name("link.onnx").is_symlink()
    assert of_onnx.stat().st_mode & 0o777 == 0o640
    assert carried(of_onnx).kind == "ONNX"


def test_containers_of_the_callers_are_not_sent_to_another_process(tmp_path):
    inputs = Inputs((SimpleNamespace(x=torch.ones(2)),))
    with pytest.warns(QRecipeWarning, match=r"QR415 .* containers that another process does not"):
        check_reopened("torch.export", tmp_path / "net.pt2", Run(inputs, torch.ones(2), None))


def test_without_its_runtime_a_file_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "find_spec", lambda name: None)
    with pytest.warns(QRecipeWarning, match="QR415 .* onnxruntime is not installed"):
        check_reopened("onnxruntime", tmp_path / "net.onnx", Run(Inputs(()), torch.ones(2), None))


def test_the_process_imports_the_runtime_alone():
    script = ROOT / "qrecipe" / "artifact" / "export" / "opener.py"
    text = f"""
import runpy, sys
runpy.run_path({str(script)!r})
assert not {{"torch", "numpy", "qrecipe"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", text], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "name"), [("pt2", "net.pt2"), ("aoti", "net.pt2")])
def test_programs_say_where_they_come_from_and_still_run(to, name, tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    source = calibrated(nn.Sequential(nn.Linear(6, 8), nn.ReLU()).eval(), "pt2e", (4, 6))
    targets.export(source, to, tmp_path / name)
    assert carried(tmp_path / name).checked.plan == source.compiled.plan


@pytest.mark.slow
def test_a_file_of_executorch_says_where_it_comes_from(tmp_path):
    pytest.importorskip("executorch")
    from export_recipes import EXECUTORCH

    text = qrecipe.parse_recipe(f'executor = "pt2e"\n{EXECUTORCH}')
    batches = [torch.randn(4, 6) for _ in range(10)]
    compiled = qrecipe.compile(nn.Sequential(nn.Linear(6, 8), nn.ReLU()).eval(), text, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    targets.export(targets.Calibrated(compiled, prepared), "pte", tmp_path / "net.pte")
    assert carried(tmp_path / "net.pte").checked.plan == compiled.plan
