"""Sessions of other runtimes in place of the converted model."""

from __future__ import annotations

import json

import pytest
import torch
from nets import NETS
from plans import recipe
from runs import silent

import qrecipe
from qrecipe.errors.findings import CalibrationError, ExecutionError, PlanError
from qrecipe.runtimes.table import RUNTIMES

pytestmark = pytest.mark.usefixtures("onnx_listed_once")

NET = NETS["residual"]
STATIC = recipe(base="builtin:x86-static-minmax")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The converted model, and a file of it."""
    pytest.importorskip("onnxscript")
    file = tmp_path_factory.mktemp("onnx") / "net.onnx"
    compiled = qrecipe.compile(NET.model(), STATIC, NET.batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, NET.batches(10), progress=silent)
    qrecipe.export_onnx(compiled, prepared, file)
    return compiled.convert(prepared), file


def session_of(name, file):
    pytest.importorskip(name)
    made = RUNTIMES[name].open(file, 1)
    return made.session if name == "onnxruntime" else made.compiled


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_compare_takes_a_session_and_compares_the_outputs(name, exported):
    converted, file = exported
    model, batches = NET.model(), NET.batches(3)
    session = session_of(name, file)
    report = qrecipe.compare(model, session, batches, progress=silent)
    beside = qrecipe.compare(model, converted, batches, progress=silent)
    assert report.batches == 3
    assert abs(report.output.sqnr_db - beside.output.sqnr_db) < 6
    assert report.sites == ()
    title = RUNTIMES[name].title
    assert report.runtime == json.loads(report.to_json())["runtime"] == title
    assert f"over 3 batches, of {title}" in str(report)
    assert "pass the converted model to compare its sites" in str(report)
    labelled = [(batch, 0) for batch in batches]
    again = qrecipe.compare(
        model, session, labelled, forward=lambda net, batch: net(batch[0]), progress=silent
    )
    assert again == report


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_needs_the_sites_says_that_a_session_has_none(name, exported):
    session, batches = session_of(name, exported[1]), NET.batches(1)
    kind = type(session).__name__
    with pytest.raises(ExecutionError, match=f"QR430 this {kind} gives outputs alone"):
        qrecipe.drift(session, batches)
    with pytest.raises(PlanError, match=rf"QR306 .*a session of another runtime \({kind}\)"):
        qrecipe.sensitivity(session, STATIC, batches)
    with pytest.raises(PlanError, match=rf"QR306 .*a session of another runtime \({kind}\)"):
        qrecipe.compare(session, session, batches)


def test_a_session_that_cannot_take_a_batch_or_gives_other_tensors_says_so(exported):
    session = session_of("onnxruntime", exported[1])
    model = NET.model()
    with pytest.raises(CalibrationError, match="QR402"):
        qrecipe.compare(model, session, [torch.randn(4, 3, 8, 9)], progress=silent)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x), x

    with pytest.raises(
        CalibrationError, match=r"QR402 .*the session returns 1 tensor, the model 2"
    ):
        qrecipe.compare(Twice(), session, NET.batches(1), progress=silent)
