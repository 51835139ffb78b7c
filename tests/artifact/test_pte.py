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
from qrecipe.artifact.export.lowering import Lowering
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
    assert judged(math.nan) is not None
    assert at_ties(result(codes, codes * 1.001)) is None
    assert at_ties(result(codes, codes * 1.2)) == "14.0 dB"


def test_what_differs_is_said_in_a_sentence():
    lowering = Lowering("XNNPACK", 2, (), 1.0, ())
    assert str(lowering).endswith("\nthe file gives the same bits as the model")
    codes = torch.arange(2000.0)
    found = Deviation.of(result(codes, codes + (codes == 3), 1.0, codes + 0.5))
    assert str(found) == "0 (Linear) in 1 of 2,000 results, by one step"
    others = [Deviation.of(result(codes, codes * 1.0001)) for _ in range(3)]
    said = str(replace(lowering, deviations=(found, *others)))
    assert "4 sites of it differ in the last place from the model, most: 0 (Linear) in" in said
    assert "in 1,999 of 2,000 results, 80 dB apart" in said
    assert "by one step" not in said


@pytest.mark.slow
def test_xnnpack_rounds_a_mean_between_two_steps_the_other_way():
    """With torch and ExecuTorch alone: why a file may differ from its program."""
    pytest.importorskip("executorch")
    import torch.ao.quantization.fx._decomposed

    operators = torch.ops.quantized_decomposed
    grid = (0.013, 0, -128, 127, torch.int8)

    class Mean(nn.Module):
        def forward(self, x):
            x = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *grid), *grid)
            x = torch.mean(x, (2, 3), keepdim=True)
            return operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *grid), *grid)

    codes = torch.arange(-60.0, 60.0).view(120, 1, 1, 1)
    x = grid[0] * (codes + torch.tensor([0.0, 1.0]).expand(120, 1, 2, 2))  # the mean is a half
    (found,) = pte._compiled(torch.export.export(Mean(), (x,)).module(), (x,))(x)
    steps = ((found - Mean()(x)).abs() / grid[0]).round()
    assert set(steps.flatten().tolist()) == {0.0, 1.0}
    means = (codes + 0.5) * grid[0]
    assert at_ties(result(Mean()(x), found, grid[0], means)) is None


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
def test_integers_of_xnnpack_differ_only_between_two(name, tmp_path):
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
    deviations = pte.write_pte(made, tmp_path / "net.pte", x).lowering.deviations
    print(f"{name}: {'; '.join(map(str, deviations))}")
    assert sum(each.different for each in deviations) < 1e-4 * x.numel()
    assert all(each.sqnr_db is None for each in deviations)


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
