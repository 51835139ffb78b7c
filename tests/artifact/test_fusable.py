"""Programs as runtimes make integer kernels of them: the same integers in other places."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from plans import net_of, recipe
from runs import silent
from torch import fx, nn

import qrecipe
from qrecipe.artifact.export.fusable import make_fusable

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.usefixtures("onnx_listed_once")

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE = decomposed.quantize_per_tensor.default
DEQUANTIZE = decomposed.dequantize_per_tensor.default
RELU, RELU6 = (aten.relu.default,), (aten.hardtanh.default, 0.0, 6.0)
FROM_ZERO, SHARED = (6 / 255, 0), (0.03, 100)


def grid(scale, zero_point, dtype=torch.uint8):
    limits = torch.iinfo(dtype)
    return scale, zero_point, limits.min, limits.max, dtype


def rounded(graph, node, *grid):
    return graph.call_function(DEQUANTIZE, (graph.call_function(QUANTIZE, (node, *grid)), *grid))


def program(clamp, *grid, first=True):
    """A sum, rounded if ``first``, a clamp and a rounding."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.add.Tensor, (x, x))
    y = rounded(graph, y, *grid) if first else y
    graph.output(rounded(graph, graph.call_function(clamp[0], (y, *clamp[1:])), *grid))
    return fx.GraphModule({}, graph)


def steps(graph_module):
    short = {"quantize_per_tensor": "Q", "dequantize_per_tensor": "DQ"}
    calls = (node.target for node in graph_module.graph.nodes if node.op == "call_function")
    return " ".join(short.get(str(t).split(".")[1], str(t).split(".")[1]) for t in calls)


@pytest.mark.parametrize(
    ("clamp", "scale", "first", "expected"),
    [
        (RELU6, FROM_ZERO, True, "add Q DQ"),
        (RELU, FROM_ZERO, True, "add Q DQ"),
        (RELU6, SHARED, True, "add Q DQ hardtanh Q DQ"),
        (RELU, SHARED, False, "add Q DQ relu Q DQ"),
        (RELU6, SHARED, False, "add Q DQ hardtanh Q DQ"),
        (RELU, FROM_ZERO, False, "add relu Q DQ"),
        (RELU6, FROM_ZERO, False, "add hardtanh Q DQ"),
    ],
)
def test_clamps_stand_where_the_layer_before_them_is_an_integer_kernel(
    clamp, scale, first, expected
):
    made = program(clamp, *grid(*scale), first=first)
    x = torch.linspace(-6, 6, 5001)
    before = made(x)
    make_fusable(made)
    assert steps(made) == expected
    assert torch.equal(made(x), before)


def test_a_clamp_at_the_end_of_seven_bits_stays():
    """QuantizeLinear would round what is beyond it to the eighth bit."""
    made = program(RELU6, 6 / 127, 0, 0, 127, torch.uint8)
    make_fusable(made)
    assert steps(made) == "add Q DQ hardtanh Q DQ"


def test_a_symmetric_grid_keeps_its_clamp_next_to_the_layer():
    made = program(RELU, *grid(0.03, 0, torch.int8), first=False)
    make_fusable(made)
    assert steps(made) == "add relu Q DQ"


def test_a_clamp_that_is_read_as_float_too_stays():
    made = program(RELU, *grid(*SHARED), first=False)
    (output,) = made.graph.find_nodes(op="output")
    (clamp,) = made.graph.find_nodes(op="call_function", target=aten.relu.default)
    output.args = ((output.args[0], clamp),)
    make_fusable(made)
    assert steps(made) == "add relu Q DQ"


def test_rounding_to_another_grid_stays():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(rounded(graph, rounded(graph, x, *grid(*SHARED)), *grid(*FROM_ZERO)))
    made = fx.GraphModule({}, graph)
    make_fusable(made)
    assert steps(made) == "Q DQ Q DQ"


@pytest.mark.parametrize(("widths", "expected"), [([0, 0], "Q DQ"), ([0, 1], "Q DQ pad Q DQ")])
def test_padding_by_nothing_is_left_out(widths, expected):
    graph = fx.Graph()
    y = rounded(graph, graph.placeholder("x"), *grid(*SHARED))
    padded = graph.call_function(aten.pad.default, (y, widths))
    graph.output(rounded(graph, padded, *grid(*SHARED)))
    made = fx.GraphModule({}, graph)
    make_fusable(made)
    assert steps(made) == expected


def joined():
    """Layers whose results share a range, since they are joined: one has negative numbers."""
    torch.manual_seed(0)
    return net_of(
        lambda self, x: self.last(torch.cat([torch.relu(self.one(x)), self.two(x)], 1)),
        one=nn.Conv2d(3, 8, 3),
        two=nn.Conv2d(3, 8, 3),
        last=nn.Conv2d(16, 4, 1),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        y = torch.relu(self.one(x))
        return torch.relu(self.bn(self.two(y)) + y)


@pytest.mark.parametrize(
    ("model", "executor"),
    [
        (joined, "pt2e"),
        (Residual, "fx"),
        pytest.param(joined, "fx", marks=pytest.mark.slow),
        pytest.param(Residual, "pt2e", marks=pytest.mark.slow),
    ],
)
def test_each_planned_layer_is_an_integer_kernel(model, executor, tmp_path):
    if executor == "pt2e":
        pytest.importorskip("torchao")
    from qrecipe.runtimes.session import in_integers
    from qrecipe.runtimes.table import RUNTIMES

    runtimes = [RUNTIMES[name] for name in ("onnxruntime", "openvino") if find_spec(name)]
    if not runtimes:
        pytest.skip("no runtime here opens files of ONNX")
    batches = [torch.randn(2, 3, 12, 12) for _ in range(10)]
    compiled = qrecipe.compile(
        model().eval(), recipe(base="builtin:x86-static-minmax"), batches[0], executor=executor
    )
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    file = tmp_path / "model.onnx"
    qrecipe.export_onnx(compiled, prepared, file)
    planned = {site.name for site in compiled.plan.sites if "Conv" in site.op}
    assert len(planned) == (3 if model is joined else 2)
    for runtime in runtimes:
        assert planned <= in_integers(runtime.open(file, 1).kernels(), planned), runtime.title
