"""Files and models opened in the runtimes that are installed here."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from nets import NETS
from plans import recipe
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import QRecipeError
from qrecipe.model.call import Inputs
from qrecipe.runtimes import table
from qrecipe.runtimes.session import Kernel, in_integers
from qrecipe.runtimes.table import RUNTIMES, known_session

pytestmark = pytest.mark.usefixtures("onnx_listed_once")

NET = NETS["residual"]
STATIC = recipe(base="builtin:x86-static-minmax")
OF_FILES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file of ONNX, its plan, an input, and the output of the converted model."""
    pytest.importorskip("onnxscript")
    file, x = tmp_path_factory.mktemp("onnx") / "net.onnx", NET.batches(1)[0]
    compiled = qrecipe.compile(NET.model(), STATIC, x)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, NET.batches(10))
    qrecipe.export_onnx(compiled, prepared, file)
    with torch.no_grad():
        return file, compiled.plan, x, compiled.convert(prepared)(x)


@pytest.mark.parametrize("name", OF_FILES)
def test_a_file_computes_what_the_model_does_from_its_path_and_from_its_content(name, exported):
    pytest.importorskip(name)
    file, _, x, expected = exported
    for source in (file, file.read_bytes()):
        (found,) = RUNTIMES[name].open(source, 1).run(Inputs((x,)))
        assert sqnr_db(expected, found) > 30


@pytest.mark.parametrize("name", OF_FILES)
def test_the_integer_kernels_are_those_of_the_planned_sites(name, exported):
    pytest.importorskip(name)
    file, plan, _, _ = exported
    kernels = RUNTIMES[name].open(file, 1).kernels()
    planned = {site.name for site in plan.sites if site.verdict == "quantized"}
    assert len(planned) > 3
    assert planned <= in_integers(kernels, planned)


@pytest.fixture(scope="module")
def exported_in_float(tmp_path_factory):
    """A file of a float model, an input, and the model's output."""
    pytest.importorskip("onnxscript")
    file, x = tmp_path_factory.mktemp("float") / "net.onnx", torch.randn(2, 6)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    with torch.no_grad():
        return file, x, model(x)


@pytest.mark.parametrize("name", OF_FILES)
def test_a_float_file_has_no_integer_kernels(name, exported_in_float):
    pytest.importorskip(name)
    file, x, expected = exported_in_float
    session = RUNTIMES[name].open(file, 1)
    kernels = session.kernels()
    assert kernels
    assert not any(kernel.is_integer for kernel in kernels)
    assert sqnr_db(expected, session.run(Inputs((x,)))[0]) > 100


@pytest.mark.parametrize("name", OF_FILES)
def test_a_session_of_the_callers_is_known_by_its_type(name, exported):
    pytest.importorskip(name)
    file, _, x, expected = exported
    made = RUNTIMES[name].open(file, 1)
    own = made.session if name == "onnxruntime" else made.compiled
    _, session = known_session(own)
    assert sqnr_db(expected, session.run(Inputs((x,)))[0]) > 30
    assert (session.kernels() is None) == (name == "onnxruntime")
    assert known_session(NET.model()) is None
    assert known_session(file) is None


PACKAGES = {"onnxruntime", "openvino", "executorch", "onnx"}


def test_to_know_a_session_imports_no_runtime(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    assert known_session(nn.ReLU()) is None
    assert not PACKAGES & sys.modules.keys()


@pytest.mark.slow
def test_to_know_a_session_imports_no_runtime_in_a_new_process():
    code = """
import sys, torch
from qrecipe.runtimes.session import Kernel
from qrecipe.runtimes.table import RUNTIMES, known_session
assert known_session(torch.nn.ReLU()) is None
assert not PACKAGES & sys.modules.keys()
"""
    code = f"PACKAGES = {PACKAGES}\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_of_the_process_are_put_back():
    before = torch.get_num_threads()
    with ExitStack() as stack:
        for name in ("torch", "inductor", "onnxruntime", "openvino"):
            stack.enter_context(RUNTIMES[name].limited(before + 1))
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_what_is_not_installed_is_named_with_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(table, "find_spec", lambda package: None if package == name else package)
    with pytest.raises(QRecipeError, match=rf"QR602.* needs {name}: .*qrecipe\[{extra}\]"):
        RUNTIMES[name].check()


@pytest.mark.slow
def test_executorch_runs_a_file_with_threads_of_its_own(tmp_path):
    pytest.importorskip("executorch")
    pte = pytest.importorskip("executorch.runtime")
    from executorch.extension.pybindings import portable_lib

    assert pte
    exir = pytest.importorskip("executorch.exir")
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), torch.randn(2, 6)
    program = exir.to_edge_transform_and_lower(torch.export.export(model, (x,))).to_executorch()
    runtime, before = RUNTIMES["executorch"], portable_lib._threadpool_get_thread_count()
    with runtime.limited(before + 1):
        assert portable_lib._threadpool_get_thread_count() == before + 1
        (found,) = runtime.open(bytes(program.buffer), 1).run(Inputs((x,)))
        with torch.no_grad():
            assert sqnr_db(model(x), found) > 100
    assert portable_lib._threadpool_get_thread_count() == before
    assert runtime.open(bytes(program.buffer), 1).kernels() is None


@pytest.mark.slow
def test_a_compiled_model_computes_the_same():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), torch.randn(2, 6)
    RUNTIMES["inductor"].check()
    session = RUNTIMES["inductor"].open(model, 1)
    with torch.no_grad():
        assert sqnr_db(model(x), session.run(Inputs((x,)))) > 100


def test_what_runtimes_add_to_the_names_of_nodes_is_left_out():
    made = [
        Kernel("QGemm", True, ("fc1/MatMul#1/MatMulAddFusion",)),
        Kernel("Convolution", True, ("conv/Conv/WithoutBiases/Multiply", "norm/QuantizeLinear")),
        Kernel("MatMul", False, ("fc2/MatMul",)),
    ]
    assert in_integers(made, {"fc1", "conv", "fc2", "fc", "norm"}) == {"fc1", "conv"}
