"""Programs of PT2E as files for other runtimes, and compiled by torch."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from export_recipes import EXECUTORCH
from nets import NETS
from places import ROOT
from plans import net_of, recipe
from torch import nn

import qrecipe
from qrecipe.artifact.export import inductor, pte
from qrecipe.artifact.export.apart import apart
from qrecipe.artifact.export.lowering import Lowering, layers_of, lowered_findings
from qrecipe.artifact.export.program import Program
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.errors.findings import ArtifactError, AuditError, QRecipeError
from qrecipe.planning.cpu import has_vnni
from qrecipe.runtimes import executorch

pytest.importorskip("torchao")

NET = NETS["residual"]
STATIC = recipe(base="builtin:x86-static-minmax", head='executor = "pt2e"')


def fresh(code, *given):
    """Run code in a new process; it sees the values as ``given``."""
    prelude = f"import sys, torch\ngiven = {[str(each) for each in given]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def converted():
    return qrecipe.quantize(NET.model(), STATIC, NET.batches(10))


@pytest.fixture
def expected(converted, tmp_path):
    """A file with an input, and what the program gives for it."""
    x = NET.batches(1)[0]
    with torch.no_grad():
        torch.save((x, converted(x)), tmp_path / "expected.pt")
    return tmp_path / "expected.pt"


def test_keyword_inputs_may_skip_a_parameter(tmp_path):
    model = net_of(
        lambda self, x, mask=None, scale=1.0: self.fc(x if mask is None else x * mask) * scale,
        fc=nn.Linear(6, 4),
    )
    x = torch.randn(3, 6)
    batch = {"scale": torch.tensor(2.0), "x": x}
    made = qrecipe.quantize(model, STATIC, [batch] * 10)
    qrecipe.export_pt2(made, tmp_path / "net.pt2", batch)
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(**batch), made(**batch))


class Clipped(nn.Module):
    """A layer whose result is written to, and one that reads what was written."""

    def __init__(self):
        super().__init__()
        self.conv, self.clip, self.last = nn.Conv2d(3, 4, 3), nn.ReLU6(True), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.clip(self.conv(x * 9)))


@pytest.mark.parametrize("written", [False, True])
def test_sites_apart_compute_what_they_compute_together(converted, written):
    x = NET.batches(1)[0]
    if written:
        torch.manual_seed(0)
        x = torch.randn(2, 3, 8, 8)
        converted = qrecipe.quantize(Clipped().eval(), STATIC, [x] * 10)
    program = Program.of(converted, qrecipe.Inputs.from_batch(x))
    alone = apart(program.graph_module, program.inputs)
    planned = {site.name for site in program.plan.sites}
    assert set(alone.sites) <= planned
    assert {node.meta["site"] for node in layers_of(program.graph_module)} <= set(alone.sites)
    with torch.no_grad():
        found = alone.graph_module(*alone.args)
    for name, one, other in zip(alone.sites, alone.expected, found, strict=True):
        assert torch.equal(one, other), name
    assert len(alone.args) > 1


def test_what_computes_otherwise_is_named_and_what_only_rounds_is_not(converted):
    x = NET.batches(1)[0]
    program = Program.of(converted, qrecipe.Inputs.from_batch(x))

    def right(graph_module, args):
        return graph_module

    def wrong(graph_module, args):
        changed = apart(program.graph_module, program.inputs).sites.index("layer1.0:add")
        return lambda *given: [
            each * (1.2 if number == changed else 1.0)
            for number, each in enumerate(graph_module(*given))
        ]

    output = program.output()
    assert list(lowered_findings(program, output, wrong)) == []
    assert list(lowered_findings(program, output * 1.2, right)) == []
    (finding,) = lowered_findings(program, output * 1.2, wrong)
    assert finding.code == "QR411"
    assert "layer1.0:add" in finding.message
    (finding,) = lowered_findings(program, output * float("nan"), right)
    assert finding.code == "QR412"


def test_the_page_has_the_line_that_installs_executorch():
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert f"    {executorch.INSTALL}\n" in page


def test_what_is_missing_is_said_before_any_work(converted, monkeypatch, tmp_path):
    x = NET.batches(1)[0]
    missing = ("executorch_of_nobody", *executorch.MODULES)
    monkeypatch.setattr(executorch, "MODULES", missing)
    with pytest.raises(QRecipeError, match=r"QR602(?s:.)*pip install --no-deps executorch=="):
        qrecipe.export_pte(converted, tmp_path / "net.pte", x)
    monkeypatch.setenv("CXX", "no-such-compiler")
    for make in (
        lambda: qrecipe.lower(converted, x),
        lambda: qrecipe.export_aoti(converted, tmp_path / "net.pt2", x),
    ):
        with pytest.raises(QRecipeError, match=r"QR602(?s:.)*no no-such-compiler"):
            make()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_program_is_exported_to_onnx(converted, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    x, file = NET.batches(1)[0], tmp_path / "net.onnx"
    compiled = qrecipe.compile(NET.model(), STATIC, x)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, NET.batches(10))
    qrecipe.export_onnx(compiled, prepared, file)
    session = onnxruntime.InferenceSession(file)
    (name,) = [given.name for given in session.get_inputs()]
    (output,) = session.run(None, {name: x.numpy()})
    with torch.no_grad():
        assert output_sqnr_db(compiled.convert(prepared)(x), torch.from_numpy(output)) > 30


@pytest.mark.slow
def test_a_lowered_program_has_an_integer_kernel_for_each_layer(converted):
    x = NET.batches(1)[0]
    lowered = qrecipe.lower(converted, x)
    count = len(list(layers_of(converted)))
    assert count > 3
    assert lowered.lowering == replace(
        lowered.lowering, compiler="Inductor", layers=count, without_kernel=()
    )
    assert lowered.lowering.seconds > 0
    assert f"{count} integer kernels" in str(lowered.lowering)
    with torch.no_grad():
        for batch in (x, torch.cat([x, x, x])):
            assert sqnr_db(converted(batch), lowered(batch)) > 30
    assert not lowered(x).requires_grad


def test_a_lowered_model_has_the_provenance_of_what_it_was_compiled_from(
    converted, monkeypatch, tmp_path
):
    x = NET.batches(1)[0]
    lowering = Lowering("Inductor", 5, (), 1.0)
    monkeypatch.setattr(inductor, "audited", lambda *given: lowering)
    monkeypatch.setattr(inductor, "check_compiler", lambda: None)
    lowered = qrecipe.lower(converted, x)
    origin = qrecipe.provenance(lowered)
    assert origin == qrecipe.provenance(converted)
    plan = qrecipe.Plan.from_json(origin.plan)
    assert plan == qrecipe.plan(NET.model(), STATIC, x)
    assert plan["layer1.0:add"].verdict == "quantized"
    for use in (
        lambda: qrecipe.save_quantized(lowered, tmp_path / "net.safetensors"),
        lambda: qrecipe.export_pt2(lowered, tmp_path / "net.pt2", x),
        lambda: qrecipe.compare(NET.model(), lowered, [x]),
        lambda: qrecipe.drift(lowered, [x]),
        lambda: qrecipe.lower(lowered, x),
    ):
        with pytest.raises(
            ArtifactError, match=r"QR501 this Lowered is compiled(?s:.)*was compiled"
        ):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_layer_that_stays_float_is_found():
    per_tensor = recipe(
        '[tensor.weight]\nobserver = "minmax"\nqscheme = "per_tensor_symmetric"\n',
        base="builtin:x86-static-minmax",
        head='executor = "pt2e"',
    )
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    made = qrecipe.quantize(model, per_tensor, [x] * 10)
    with pytest.raises(AuditError, match=r'QR410 .*left 1 linear layer of 1 float: "0"'):
        qrecipe.lower(made, x)


@pytest.mark.slow
def test_a_layer_without_a_kernel_is_named():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    lowered = qrecipe.lower(qrecipe.quantize(model, STATIC, [x] * 10), x)
    assert lowered.lowering.layers == 1
    assert lowered.lowering.without_kernel == ("0",)
    assert str(lowered.lowering).endswith("it has none for 0")


@pytest.mark.slow
def test_a_compiled_kernel_that_is_wrong_is_found(converted, monkeypatch):
    x = NET.batches(1)[0]
    forward = inductor.Lowered.forward

    def saturated(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        clip = lambda y: y.clamp(max=y.max() / 2)  # noqa: E731
        return torch.utils._pytree.tree_map(clip, result)

    monkeypatch.setattr(inductor.Lowered, "forward", saturated)
    with pytest.raises(AuditError, match="QR411 the compiled kernel of"):
        qrecipe.lower(converted, x)


class Block(nn.Module):
    """Layers that read the same tensor as a sum does."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        x = torch.relu(self.out(x))
        return x + self.one(x) * self.two(x)


@pytest.mark.slow
def test_layers_that_share_what_they_read_with_a_sum_become_kernels():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24)
    made = qrecipe.quantize(Block().eval(), STATIC, [x] * 10)
    assert qrecipe.lower(made, x).lowering.layers == 3


@pytest.mark.slow
def test_a_layer_that_is_called_twice_and_a_tied_one_become_kernels():
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.tied(self.one(torch.relu(self.one(x)))),
        one=nn.Linear(24, 24),
        tied=nn.Linear(24, 24),
    )
    model.tied.weight = model.one.weight
    x = torch.randn(4, 24)
    assert qrecipe.lower(qrecipe.quantize(model, STATIC, [x] * 10), x).lowering.layers == 3


@pytest.mark.slow
def test_weights_alone_have_no_kernel():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval(),
        torch.rand(4, 24),
    )
    made = qrecipe.quantize(model, "builtin:linear-weight-only", example_inputs=x)
    lowering = qrecipe.lower(made, x).lowering
    assert (lowering.layers, lowering.without_kernel) == (0, ("0", "2"))


@pytest.mark.cpu
@pytest.mark.slow
def test_a_kernel_that_saturates_on_this_cpu_is_found():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(768, 256), nn.ReLU()).eval(), torch.rand(16, 768)
    made = qrecipe.quantize(
        model, "builtin:x86-vnni-static-minmax", [x] * 10, executor="pt2e", target_cpu="vnni"
    )
    if has_vnni():
        assert qrecipe.lower(made, x).lowering.layers == 1
    else:
        with pytest.raises(AuditError, match="QR411 the compiled kernel of 0 "):
            qrecipe.lower(made, x)


@pytest.mark.slow
def test_a_package_is_run_in_a_fresh_process(converted, expected, tmp_path):
    x, file = NET.batches(1)[0], tmp_path / "net.pt2"
    qrecipe.export_aoti(converted, file, x)
    code = """
x, expected = torch.load(given[1])
module = torch._inductor.aoti_load_package(given[0])
for batch, output in ((x, expected), (torch.cat([x, x]), torch.cat([expected, expected]))):
    error = module(batch) - output
    print((20 * torch.log10(output.norm() / error.norm())).item())
assert "torchao" not in sys.modules and "qrecipe" not in sys.modules
"""
    assert min(map(float, fresh(code, file, expected).split())) > 30


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


@pytest.mark.slow
def test_a_single_sample_has_its_size(tmp_path):
    pytest.importorskip("executorch")
    made, x = executorch_program(NETS["mlp"]), NETS["mlp"].batches(1)[0][:1]
    qrecipe.export_pte(made, tmp_path / "net.pte", x)
    (output,) = run_by_executorch(tmp_path / "net.pte", tmp_path, x)
    with torch.no_grad():
        assert torch.equal(made(x), output)


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


def test_one_step_of_quantization_is_right_and_two_are_not():
    codes = torch.tensor([3.0, -5.0, 0.0])
    step = 0.01
    assert pte.in_steps(codes * step, codes * step, step) is None
    assert pte.in_steps(codes * step, (codes + 1) * step, step) is None
    assert pte.in_steps(codes * step, (codes - 2) * step, step) == "2 quantization steps"
    assert pte.in_steps(codes, codes * math.nan, step) is not None
    assert pte.in_steps(codes, codes * 1.001, None) is None
    assert pte.in_steps(codes, codes * 1.2, None) == "14.0 dB"


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
    assert pte.in_steps(Mean()(x), found, grid[0]) is None


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
def test_another_backend_is_not_written_for_executorch(converted, tmp_path):
    pytest.importorskip("executorch")
    with pytest.raises(ArtifactError, match=r'QR512(?s:.)*backend = "executorch"'):
        qrecipe.export_pte(converted, tmp_path / "net.pte", NET.batches(1)[0])
    assert not (tmp_path / "net.pte").exists()
