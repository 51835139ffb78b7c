"""Sessions of other runtimes in place of the converted model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from nets import NETS
from plans import recipe
from runs import silent
from torch import nn

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
    with pytest.raises(ExecutionError, match=f"QR430 this {kind} only returns outputs"):
        qrecipe.drift(session, batches)
    with pytest.raises(PlanError, match=rf"QR306 .*a session of another runtime \({kind}\)"):
        qrecipe.sensitivity(session, STATIC, batches)
    with pytest.raises(ExecutionError, match=f"QR422 this {kind} only returns outputs"):
        qrecipe.sensitivity(NET.model(), session, batches)
    with pytest.raises(PlanError, match=rf"QR306 .*a session of another runtime \({kind}\)"):
        qrecipe.compare(session, session, batches)


class Other(nn.Module):
    """Takes and returns what it is told to, with a layer for it."""

    def __init__(self, returns, size=(3, 8, 8)):
        super().__init__()
        self.returns, self.layer = returns, nn.Linear(math.prod(size), 4)

    def forward(self, *given):
        return self.returns(self.layer(given[0].flatten(1).float()))


IMAGES = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("model", "batch", "why"),
    [
        (Other(lambda y: y), (IMAGES, IMAGES), "it takes 1 tensor, not 2"),
        (Other(lambda y: y, (3, 8, 9)), torch.zeros(4, 3, 8, 9), "9.*8|8.*9"),
        (Other(lambda y: (y, y)), IMAGES, "it returns 1 tensor, the model 2"),
        (Other(lambda y: y[:, :3]), IMAGES, r"it returns \[4, .*the model \[4, 3\]"),
    ],
    ids=["inputs", "sizes", "outputs", "shapes"],
)
def test_a_session_of_another_model_says_what_differs(name, model, batch, why, exported):
    session, title = session_of(name, exported[1]), RUNTIMES[name].title
    fit = f"QR402 this session of {title} does not fit the model on batch 0 .*: "
    with pytest.raises(CalibrationError, match=f"{fit}.*({why})") as raised:
        qrecipe.compare(model.eval(), session, [batch], progress=silent)
    assert "Exception from" not in str(raised.value)
    assert raised.value.findings[0].hint.startswith("pass the float model that its file")


def test_a_batch_that_the_model_cannot_take_is_not_the_sessions_fault(exported):
    session = session_of("onnxruntime", exported[1])
    batches = [IMAGES, torch.zeros(4, 5, 8, 8)]
    with pytest.raises(CalibrationError, match="QR402 the model cannot take batch 1"):
        qrecipe.compare(NET.model(), session, batches, progress=silent)
