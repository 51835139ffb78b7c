"""Programs of PT2E as files for other runtimes, and compiled by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import NETS
from places import ROOT
from plans import net_of, recipe
from programs import fresh
from torch import nn

import qrecipe
from qrecipe.artifact.export import inductor
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


@pytest.mark.parametrize("samples", [1, 4])
def test_a_fixed_batch_is_the_only_size_that_a_program_takes(converted, samples, tmp_path):
    x, file = NET.batches(1)[0][:samples], tmp_path / "net.pt2"
    qrecipe.export_pt2(converted, file, x, dynamic_shapes=None)
    program = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(program(x), converted(x))
        with pytest.raises(RuntimeError, match=f"equal to {samples}"):
            program(x.repeat(2, 1, 1, 1))


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

    def right(graph_module, inputs):
        return inputs.call(graph_module)

    def wrong(graph_module, inputs):
        changed = apart(program.graph_module, program.inputs).sites.index("layer1.0:add")
        return [
            each * (1.2 if number == changed else 1.0)
            for number, each in enumerate(inputs.call(graph_module))
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
@pytest.mark.parametrize(("sizes", "found"), [("batch", 6), (None, 3)])
def test_a_package_is_compiled_for_any_batch_or_for_one(converted, sizes, found, tmp_path):
    x = NET.batches(1)[0][:3]
    qrecipe.export_aoti(converted, tmp_path / "net.pt2", x, dynamic_shapes=sizes)
    module = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    assert output_sqnr_db(converted(x), module(x)) > 30
    assert len(module(torch.cat([x, x]))) == found


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


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(8, 16, 1, dilation=2, padding=1, stride=(1, 2)),
        lambda: nn.Conv1d(8, 16, 2, padding=2, groups=8),
    ],
)
def test_a_kernel_that_could_end_the_process_is_refused_before_it_is_compiled(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer()).eval()
    x = torch.randn(2, 8, 11, 1) if isinstance(model[0], nn.Conv2d) else torch.randn(2, 8, 11)
    made = qrecipe.quantize(model, STATIC, [x] * 10)
    with pytest.raises(AuditError, match=r"QR411 (.|\n)*padding is as wide as the kernel"):
        qrecipe.lower(made, x)
