"""Outputs of exported files have the names that the model gives them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from plans import net_of, recipe
from runs import silent
from torch import Tensor, nn

import qrecipe
from qrecipe.artifact.export.onnx_names import name_outputs
from qrecipe.model.nested import map_leaves, tensors_in
from qrecipe.model.outputs import output_names

pytestmark = pytest.mark.usefixtures("onnx_listed_once")

STATIC = recipe(base="builtin:x86-static-minmax")
BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(10)]


@dataclass
class Found:
    logits: Tensor
    hidden: tuple


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (0, [None]),
        ((0, [0]), [None, None]),
        ({"y": 0, "aux": {"h": 0, "both": (0, 0)}}, ["y", "aux.h", "aux.both.0", "aux.both.1"]),
        (Found(0, (0, 0)), ["logits", "hidden.0", "hidden.1"]),
        (Pair(0, {"of": 0}), ["first", "second.of"]),
        ((0, {"scale": 3.0, "none": None, "h": 0}), [None, "1.h"]),
        ({1: 0, "": 0, "a.b": 0}, [None, None, "a.b"]),
    ],
)
def test_names_are_keys_and_fields_joined_by_dots(output, names):
    filled = map_leaves(lambda leaf: torch.zeros(1) if leaf == 0 else leaf, output)
    assert list(output_names(filled)) == names


def net():
    """Names that are also those of an input, of a weight and of other values of the file."""
    torch.manual_seed(0)

    def forward(self, x):
        h = torch.relu(self.first(x))
        y = self.last(h)
        inner = {"hidden": h, "first.weight": h + 1}
        return {"logits": y, "x": h, "aux": inner, "again": y, "given": x, "linear": (y * 2,)}

    return net_of(forward, first=nn.Linear(6, 6), last=nn.Linear(6, 3))


NAMES = ["logits", "x_out", "aux.hidden", "aux.first.weight", "again", "given", "linear.0"]


@pytest.fixture(scope="module")
def calibrated():
    pytest.importorskip("onnxscript")
    compiled = qrecipe.compile(net(), STATIC, BATCHES[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, BATCHES, progress=silent)
    return compiled, prepared


def test_a_file_of_onnx_has_the_names_of_inputs_and_outputs(calibrated, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    compiled, prepared = calibrated
    qrecipe.export_onnx(compiled, prepared, tmp_path / "net.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"), full_check=True)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert [each.name for each in session.get_inputs()] == ["x"]
    found = dict(zip(NAMES, session.run(NAMES, {"x": BATCHES[0].numpy()}), strict=True))
    expected = compiled.convert(prepared)(BATCHES[0])
    for name, tensor in zip(NAMES, tensors_in(expected), strict=True):
        assert torch.allclose(torch.from_numpy(found[name]), tensor, atol=0.05), name


@pytest.mark.slow
def test_a_file_of_openvino_has_them_too(calibrated, tmp_path):
    openvino = pytest.importorskip("openvino")
    qrecipe.export_openvino(*calibrated, tmp_path / "net.xml")
    opened = openvino.Core().read_model(tmp_path / "net.xml")
    assert [each.any_name for each in opened.inputs] == ["x"]
    assert [name in each.names for name, each in zip(NAMES, opened.outputs, strict=True)] == [
        True
    ] * len(NAMES)


@pytest.mark.slow
def test_a_file_of_torch_export_returns_the_containers(tmp_path):
    pytest.importorskip("torchao")
    converted = qrecipe.quantize(net(), STATIC, BATCHES, executor="pt2e", progress=silent)
    qrecipe.export_pt2(converted, tmp_path / "net.pt2", BATCHES[0])
    with torch.no_grad():
        found = torch.export.load(tmp_path / "net.pt2").module()(BATCHES[0])
    assert list(output_names(found))[1] == "x"
    assert torch.equal(found["aux"]["hidden"], converted(BATCHES[0])["aux"]["hidden"])


def test_values_of_graphs_inside_operators_are_renamed_with_the_others():
    onnx = pytest.importorskip("onnx")
    make, floats = onnx.helper, onnx.TensorProto.FLOAT
    value = partial(make.make_tensor_value_info, elem_type=floats, shape=[2])
    inner = [
        make.make_graph([make.make_node(kind, ["y"], [result])], "branch", [], [value(result)])
        for kind, result in (("Neg", "found"), ("Abs", "other"))
    ]
    nodes = [
        make.make_node("Relu", ["x"], ["y"]),
        make.make_node("If", ["is_on"], ["z"], then_branch=inner[0], else_branch=inner[1]),
    ]
    flag = make.make_tensor_value_info("is_on", onnx.TensorProto.BOOL, [])
    graph = make.make_graph(nodes, "net", [value("x"), flag], [value("z"), value("y")])
    name_outputs(graph, ["found", None])
    onnx.checker.check_model(make.make_model(graph), full_check=True)
    assert [each.name for each in graph.output] == ["found", "y"]
    name_outputs(graph, ["x", "kept"])
    onnx.checker.check_model(make.make_model(graph), full_check=True)
    assert [each.name for each in graph.output] == ["x_out", "kept"]
    assert {node.input[0] for node in graph.node[1].attribute[0].g.node} == {"kept"}
