"""Files of ExecuTorch, and what XNNPACK's kernels give next to the program."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from export_recipes import EXECUTORCH
from nets import NETS
from plans import net_of, recipe
from programs import fresh
from torch import nn

import qrecipe
from qrecipe.artifact.export import pte
from qrecipe.artifact.export.deviations import Deviation, Result, at_ties
from qrecipe.artifact.export.integer_kernels import KERNELS, Grid
from qrecipe.artifact.export.integers import in_integers
from qrecipe.artifact.export.lowering import Lowering
from qrecipe.artifact.export.program import Program
from qrecipe.errors.findings import ArtifactError, AuditError

pytest.importorskip("torchao")

STATIC = recipe(base="builtin:x86-static-minmax", head='executor = "pt2e"')
EXECUTORCH_PROGRAM = qrecipe.parse_recipe(f'executor = "pt2e"\n{EXECUTORCH}')


def executorch_program(net):
    return qrecipe.quantize(net.model(), EXECUTORCH_PROGRAM, net.batches(20))


def run_by_executorch(file, folder, *batches):
    """What a file gives for each batch, in a fresh process."""
    torch.save(batches, folder / "batches.pt")
    code = """
from executorch.runtime import Runtime
program = Runtime.get().load_program(given[0])
method = program.load_method("forward")
outputs = [method.execute([batch])[0].clone() for batch in torch.load(given[1])]
torch.save(outputs, given[2])
assert "qrecipe" not in sys.modules
"""
    fresh(code, file, folder / "batches.pt", folder / "outputs.pt")
    return torch.load(folder / "outputs.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "mlp", "shared_conv", "squeeze_excite"])
def test_a_file_of_executorch_gives_the_same_bits_for_each_batch_size(name, tmp_path):
    pytest.importorskip("executorch")
    net, file = NETS[name], tmp_path / "net.pte"
    made, x = executorch_program(net), net.batches(1)[0]
    qrecipe.export_pte(made, file, x)
    batches = [x, x[:1]]
    with torch.no_grad():
        for batch, output in zip(batches, run_by_executorch(file, tmp_path, *batches), strict=True):
            assert torch.equal(made(batch), output)


@pytest.mark.slow
def test_keywords_of_a_file_are_in_the_order_of_the_signature(tmp_path):
    pytest.importorskip("executorch")
    net = NETS["keywords"]
    batch = net.batches(1)[0]
    assert list(batch) == ["second", "first"]
    qrecipe.export_pte(executorch_program(net), tmp_path / "net.pte", batch)
    assert (tmp_path / "net.pte").exists()


class Pair(NamedTuple):
    one: torch.Tensor
    rest: dict


@pytest.mark.slow
def test_results_are_the_tensors_of_any_container(tmp_path):
    pytest.importorskip("executorch")
    model = net_of(
        lambda self, x: Pair(y := self.fc(x), {"twice": [y * 2, None], "kind": "text"}),
        fc=nn.Linear(6, 4),
    )
    x = torch.randn(3, 6)
    made = qrecipe.quantize(model, EXECUTORCH_PROGRAM, [x] * 10)
    qrecipe.export_pte(made, tmp_path / "net.pte", x)
    (output,) = run_by_executorch(tmp_path / "net.pte", tmp_path, x)
    with torch.no_grad():
        assert torch.equal(made(x).one, output)


@pytest.mark.slow
def test_a_single_sample_has_its_size(tmp_path):
    pytest.importorskip("executorch")
    made, x = executorch_program(NETS["mlp"]), NETS["mlp"].batches(1)[0][:1]
    qrecipe.export_pte(made, tmp_path / "net.pte", x)
    (output,) = run_by_executorch(tmp_path / "net.pte", tmp_path, x)
    with torch.no_grad():
        assert torch.equal(made(x), output)


@pytest.mark.slow
def test_a_fixed_number_of_samples_is_the_only_one(tmp_path):
    pytest.importorskip("executorch")
    made, x = executorch_program(NETS["attention"]), NETS["attention"].batches(1)[0]
    qrecipe.export_pte(made, tmp_path / "net.pte", x, dynamic_shapes=None)
    (output,) = run_by_executorch(tmp_path / "net.pte", tmp_path, x)
    with torch.no_grad():
        assert torch.equal(made(x), output)
    with pytest.raises(AssertionError, match="RuntimeError"):
        run_by_executorch(tmp_path / "net.pte", tmp_path, x[:1])


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["module", "weight"])
def test_tied_layers_with_others_in_between_are_one_program(tied, tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.three(self.two(self.one(x).relu()).relu()),
        **{name: nn.Linear(24, 24) for name in ("one", "two", "three")},
    )
    if tied == "module":
        model.three = model.one
    model.three.weight = model.one.weight
    x = torch.randn(8, 24)
    made = qrecipe.quantize(model, EXECUTORCH_PROGRAM, [x] * 10)
    qrecipe.export_pte(made, tmp_path / "net.pte", x)
    (output,) = run_by_executorch(tmp_path / "net.pte", tmp_path, x)
    with torch.no_grad():
        assert torch.equal(made(x), output)


def result(expected, found, step=None, unrounded=None):
    site = qrecipe.plan(nn.Sequential(nn.Linear(2, 2)).eval(), STATIC, torch.zeros(2, 2))["0"]
    return Result(site, expected, found, expected if unrounded is None else unrounded, step)


def test_one_step_of_quantization_is_right_between_two_and_nowhere_else():
    codes, step = torch.tensor([3.0, -5.0, 0.0]), 0.01

    def judged(steps, unrounded=0.0):
        return at_ties(
            result(codes * step, (codes + steps) * step, step, (codes + unrounded) * step)
        )

    assert judged(0) is None
    assert judged(1, 0.4999) is None
    assert judged(-1, -0.5001) is None
    assert judged(1, 0.4) == "one quantization step (0.10 from a tie)"
    assert judged(torch.tensor([0, 1, 0])) == "one quantization step (0.50 from a tie)"
    assert judged(-2) == "2 quantization steps"
    added = replace(result(codes * step, (codes + 1) * step, step), unrounded=None)
    assert at_ties(added) == "one quantization step"
    assert judged(math.nan) is not None
    assert at_ties(result(codes, codes * 1.001)) is None
    assert at_ties(result(codes, codes * 1.2)) == "14.0 dB"


def test_what_differs_is_said_in_a_sentence():
    lowering = Lowering("XNNPACK", 2, (), 1.0, (), exact=True)
    assert str(lowering).endswith("\nthe file gives the same bits as the model")
    alone = "\nrun alone, each site of the file gives the same bits as the model"
    assert str(replace(lowering, exact=False)).endswith(alone)
    codes = torch.arange(2000.0)
    found = Deviation.of(result(codes, codes + (codes == 3), 1.0, codes + 0.5))
    assert str(found) == "0 (Linear) in 1 of 2,000 results, by one step"
    others = [Deviation.of(result(codes, codes * 1.0001)) for _ in range(3)]
    said = str(replace(lowering, deviations=(found,)))
    assert "as the model computed in integers; run alone, 1 site of it differs in the last" in said
    said = str(replace(lowering, deviations=(found, *others), exact=False))
    assert "4 sites of it differ in the last place from the model, most: 0 (Linear) in" in said
    assert "in 1,999 of 2,000 results, 80 dB apart" in said
    assert "by one step" not in said


aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed


def ties():
    """A program half of whose results lie in the middle of two integers."""
    model = net_of(lambda self, x: F.adaptive_avg_pool2d(self.conv(x), 1), conv=nn.Conv2d(8, 64, 1))
    x = torch.randn(8, 8, 2, 1)
    return Program.of(qrecipe.quantize(model, EXECUTORCH_PROGRAM, [x] * 10), qrecipe.Inputs((x,)))


def test_a_file_that_computes_in_integers_is_exact_where_the_program_rounds_otherwise():
    program = ties()
    found = in_integers(program.graph_module, program.inputs)
    exact, (deviation,) = pte._compared(program, found)
    assert exact
    assert deviation.op == "adaptive_avg_pool2d"
    assert deviation.results / 8 < deviation.different < deviation.results
    assert deviation.sqnr_db is None


def test_a_result_between_two_integers_that_is_rounded_otherwise_than_xnnpack_does_is_found(
    monkeypatch,
):
    program = ties()
    monkeypatch.setattr(pte, "_computed", lambda graph_module, inputs: inputs.call(graph_module))
    (expected,) = in_integers(program.graph_module, program.inputs)
    with pytest.raises(AuditError, match=r"QR411 .*something else: one quantization step"):
        pte._compared(program, [expected + 0.001])


def cut_off(kernel, operator, made, *read):
    finer = Grid(made.scale / 256, made.zero_point * 256)
    return (kernel.steps(operator, finer, *read) / 256).floor()


def scaled_wrongly(kernel, operator, made, *read):
    return kernel.steps(operator, Grid(made.scale * (1 + 2**-8), made.zero_point), *read)


@pytest.mark.parametrize(
    ("name", "operator", "sabotage"),
    [
        ("mlp", aten.linear.default, cut_off),
        ("residual", aten.conv2d.default, scaled_wrongly),
        ("residual", aten.add.Tensor, cut_off),
        ("squeeze_excite", aten.mul.Tensor, scaled_wrongly),
    ],
)
def test_an_integer_kernel_that_computes_otherwise_is_found(name, operator, sabotage, monkeypatch):
    made = executorch_program(NETS[name])
    program = Program.of(made, qrecipe.Inputs.from_batch(NETS[name].batches(1)[0]))
    assert operator in {node.target for node in program.graph_module.graph.nodes}

    def sabotaged(graph_module, inputs):
        kernel = KERNELS[operator]
        with monkeypatch.context() as patch:
            patch.setitem(KERNELS, operator, replace(kernel, steps=partial(sabotage, kernel)))
            return in_integers(graph_module, inputs)

    monkeypatch.setattr(pte, "_computed", sabotaged)
    with pytest.raises(AuditError, match=r"QR411 (?s:.*)computes something else: (one|\d+) quanti"):
        pte._compared(program, sabotaged(program.graph_module, program.inputs))


def grid(scale, zero_point):
    return torch.tensor(scale).item(), zero_point, -128, 127, torch.int8


def on(grid, x):
    return decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *grid), *grid)


GRIDS = (
    (grid(2**-5, 7), grid(2**-5, -20), grid(2**-4, 3)),
    (grid(3 * 2**-6, -31), grid(2**-5, 0), grid(3 * 2**-6, -4)),
    (grid(0.0123, 11), grid(0.031, -7), grid(0.0246, 1)),
    (grid(2**-6, 5), grid(3 * 2**-8, -9), grid(2**-4, 0)),
)
"""Of two operands and a result: many results lie in the middle of two integers."""

CALLS = {
    "sum": lambda a, b, conv: a + b,
    "sum, ReLU": lambda a, b, conv: F.relu(a + b),
    "difference": lambda a, b, conv: a - b,
    "sum of one": lambda a, b, conv: a + a,
    "product": lambda a, b, conv: a * b,
    "square": lambda a, b, conv: a * a,
    "average": lambda a, b, conv: a.mean((2, 3), keepdim=True),
    "average of all pixels": lambda a, b, conv: F.adaptive_avg_pool2d(a, 1),
    "convolution": lambda a, b, conv: conv(a),
    "convolution, ReLU": lambda a, b, conv: F.relu(conv(a)),
    "convolution, clamp": lambda a, b, conv: F.relu6(conv(a)),
}


class Calls(nn.Module):
    """Each call for each of the grids."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (8, 16, 3, 3), dtype=torch.int8))
        self.register_buffer("scale", 2.0 ** -torch.arange(6.0, 10).repeat(2))
        self.register_buffer("zero", torch.zeros(8, dtype=torch.int64))
        for number, (one, _, _) in enumerate(GRIDS):
            step = self.scale * one[0]
            self.register_buffer(f"bias{number}", (torch.randn(8) / step).round() * step)

    def conv(self, number, x):
        grids = (self.scale, self.zero, 0, -127, 127, torch.int8)
        weight = decomposed.dequantize_per_channel(self.weight, *grids)
        return F.conv2d(x, weight, getattr(self, f"bias{number}"), padding=1)

    def forward(self, a, b):
        return tuple(
            on(made, call(on(one, a), on(other, b), partial(self.conv, number)))
            for call in CALLS.values()
            for number, (one, other, made) in enumerate(GRIDS)
        )


@pytest.mark.slow
def test_integer_kernels_are_those_of_xnnpack_bit_by_bit():
    """With torch and ExecuTorch alone, also where float32 rounds otherwise."""
    pytest.importorskip("executorch")
    import torch.ao.quantization.fx._decomposed

    torch.manual_seed(0)
    inputs = qrecipe.Inputs((2 * torch.randn(4, 16, 8, 8), 2 * torch.randn(4, 16, 8, 8)))
    graph_module = torch.export.export(Calls(), inputs.args).module()
    pte._separate_readers(graph_module)
    found = pte._computed(graph_module, inputs)
    assert all(map(torch.equal, in_integers(graph_module, inputs), found))
    plain = inputs.call(graph_module)
    names = [name for name in CALLS for _ in GRIDS]
    differing = {
        name for name, *pair in zip(names, plain, found, strict=True) if not torch.equal(*pair)
    }
    assert differing >= {"sum", "sum, ReLU", "difference", "average", "average of all pixels"}


OPERATORS = {
    "linear": lambda self, x: self.linear(x.flatten(1)),
    "convolution": lambda self, x: self.conv(x),
    "convolution, ReLU": lambda self, x: self.relu(self.conv(x)),
    "depthwise convolution": lambda self, x: self.depthwise(x),
    "sum": lambda self, x: self.conv(x) + x,
    "sum, ReLU": lambda self, x: self.relu(self.conv(x) + x),
    "difference": lambda self, x: self.conv(x) - x,
    "product": lambda self, x: self.conv(x) * x,
    "mean": lambda self, x: self.conv(x).mean((2, 3)),
    "average of all pixels": lambda self, x: F.adaptive_avg_pool2d(self.conv(x), 1),
    "maximum": lambda self, x: F.max_pool2d(self.conv(x), 2),
    "clamp": lambda self, x: F.hardtanh(self.conv(x)),
    "leaky ReLU": lambda self, x: F.leaky_relu(self.conv(x)),
    "join": lambda self, x: torch.cat([self.conv(x), x], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_xnnpack_gives_the_bits_of_the_model_computed_in_integers(name, tmp_path):
    """The table of docs/export.md; ``-rP`` shows what it is made of."""
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = net_of(
        OPERATORS[name],
        conv=nn.Conv2d(16, 16, 3, padding=1),
        depthwise=nn.Conv2d(16, 16, 3, padding=1, groups=16),
        linear=nn.Linear(16 * 24 * 24, 64),
        relu=nn.ReLU(),
    )
    x = torch.randn(16, 16, 24, 24)
    made = qrecipe.quantize(model, EXECUTORCH_PROGRAM, [x] * 10)
    lowering = pte.write_pte(made, tmp_path / "net.pte", x).lowering
    print(f"{name}: {'; '.join(map(str, lowering.deviations))}")
    assert lowering.exact
    assert sum(each.different for each in lowering.deviations) < 1e-4 * x.numel()


@pytest.mark.slow
def test_a_file_says_where_it_differs(tmp_path):
    pytest.importorskip("executorch")
    made, x = executorch_program(NETS["norms"]), NETS["norms"].batches(1)[0]
    deviations = pte.write_pte(made, tmp_path / "net.pte", x).lowering.deviations
    assert (
        {"group", ":layer_norm"}
        <= {each.site for each in deviations}
        <= {*("group", ":mean", "layer", ":layer_norm")}
    )
    assert min(each.sqnr_db for each in deviations) > 120


@pytest.mark.slow
def test_a_kernel_of_xnnpack_that_is_wrong_is_found(tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    made, x = executorch_program(NETS["mlp"]), NETS["mlp"].batches(1)[0]
    run = pte._run
    monkeypatch.setattr(pte, "_run", lambda *given: [each * 1.02 for each in run(*given)])
    with pytest.raises(
        AuditError, match=r"QR411 .*computes something else: \d+ quantization steps"
    ):
        qrecipe.export_pte(made, tmp_path / "net.pte", x)
    assert not (tmp_path / "net.pte").exists()


@pytest.mark.slow
def test_a_file_that_is_wrong_only_as_a_whole_is_found(tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    made, x = executorch_program(NETS["mlp"]), NETS["mlp"].batches(1)[0]
    run, calls = pte._run, []

    def wrong(*given):
        calls.append(given)
        return [each * (1.1 if len(calls) == 1 else 1) for each in run(*given)]

    monkeypatch.setattr(pte, "_run", wrong)
    with pytest.raises(AuditError, match=r"QR412 the file is 20\.0 dB from the model, but no site"):
        qrecipe.export_pte(made, tmp_path / "net.pte", x)


@pytest.mark.slow
def test_a_layer_that_xnnpack_does_not_take_is_found(tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition import xnnpack_partitioner as xnnpack
    from executorch.backends.xnnpack.partition.config.generic_node_configs import AddConfig

    adding = partial(xnnpack.XnnpackPartitioner, configs=[AddConfig])
    monkeypatch.setattr(xnnpack, "XnnpackPartitioner", adding)
    made, x = executorch_program(NETS["mlp"]), NETS["mlp"].batches(1)[0]
    with pytest.raises(AuditError, match="QR410 XNNPACK does not take"):
        qrecipe.export_pte(made, tmp_path / "net.pte", x)
    assert not (tmp_path / "net.pte").exists()


@pytest.mark.slow
def test_another_backend_is_not_written_for_executorch(tmp_path):
    pytest.importorskip("executorch")
    net = NETS["mlp"]
    converted = qrecipe.quantize(net.model(), STATIC, net.batches(10))
    with pytest.raises(ArtifactError, match=r'QR512(?s:.)*backend = "executorch"'):
        qrecipe.export_pte(converted, tmp_path / "net.pte", net.batches(1)[0])
    assert not (tmp_path / "net.pte").exists()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.last(torch.relu(self.first(x) * scale))


def test_an_input_without_dimensions_that_is_rounded_is_named_and_what_is_said_helps(tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    file, x, scale = tmp_path / "net.pte", torch.randn(4, 8), torch.tensor(2.0)

    def export(number, rules=""):
        batch = (x, number)
        a_recipe = qrecipe.parse_recipe(EXECUTORCH + rules)
        made = qrecipe.quantize(Scaled().eval(), a_recipe, [batch] * 10, executor="pt2e")
        qrecipe.export_pte(made, file, batch)

    with pytest.raises(ArtifactError, match=r'QR512 .* "scale"') as raised:
        export(scale)
    assert raised.value.findings[0].hint == "pass scale.reshape(1), or leave :mul float, by a rule"
    export(scale.reshape(1))
    export(scale, '[rules.module_name]\n":mul" = "float"\n')
