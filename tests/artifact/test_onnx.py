"""Export to ONNX: onnxruntime computes what the converted model computes."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from artifacts import outputs, recipe, trained
from nets import NETS
from plans import net_of
from routed import Body, Head, Routed, recipe_of_roots
from runs import silent
from torch import nn

import qrecipe
from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import ReferenceQuantizedModule
from qrecipe.artifact.export import onnx as export
from qrecipe.artifact.export import onnx_check
from qrecipe.artifact.export.judged import mostly_equal
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import (
    ArtifactError,
    AuditError,
    CalibrationError,
    QRecipeError,
    QRecipeWarning,
)
from qrecipe.execution.fx import exportable as decomposition
from qrecipe.runtimes import table

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("onnx_listed_once")

pytestmark = pytest.mark.usefixtures("operators_listed_once")

AGREE_DB = 30.0
"""A result that lies between two steps may be rounded to either; nothing else differs."""

ALWAYS = ("shared_conv",)


def prepared(name, a_recipe):
    net = NETS[name]
    batches = net.batches()
    compiled = qrecipe.compile(net.model(), a_recipe, batches[0])
    model = compiled.prepare()
    qrecipe.calibrate(model, batches, progress=silent)
    return compiled, model, batches


@pytest.fixture(scope="module")
def mlp():
    return prepared("mlp", recipe())


@pytest.fixture(scope="module")
def content(mlp, tmp_path_factory):
    """What torch's exporter makes of the net."""
    compiled, model, _ = mlp
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    qrecipe.export_onnx(compiled, model, path)
    return path.read_bytes()


def run_onnx(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    given = batch if isinstance(batch, dict) else {names[0]: batch}
    found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    return [torch.from_numpy(array) for array in found]


def tensor_types(path):
    """The types of the stored tensors of two and more dimensions."""
    return {
        onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in onnx.load(path).graph.initializer
        if len(tensor.dims) > 1
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n not in ALWAYS else []) for n in NETS]
)
def test_onnxruntime_agrees_with_the_converted_model(name, tmp_path):
    compiled, model, batches = prepared(name, recipe())
    path = tmp_path / "model.onnx"
    qrecipe.export_onnx(compiled, model, path)
    assert tensor_types(path) <= {"INT8", "FLOAT"}
    assert "INT8" in tensor_types(path)
    converted = compiled.convert(model)  # the export has left it as it was
    for batch in batches[:2]:
        expected, actual = outputs(converted, batch), run_onnx(path, batch)
        assert [e.shape for e in expected] == [a.shape for a in actual]
        assert all(sqnr_db(e, a) > AGREE_DB for e, a in zip(expected, actual, strict=True))


def test_padding_that_reflects_is_exported(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")).eval()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(10)]
    compiled = qrecipe.compile(net, recipe(), batches[0])
    model = compiled.prepare()
    qrecipe.calibrate(model, batches, progress=silent)
    qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")
    (found,) = run_onnx(tmp_path / "model.onnx", batches[0])
    assert sqnr_db(compiled.convert(model)(batches[0]), found) > AGREE_DB


@pytest.mark.slow
def test_a_trained_model_is_exported_as_it_is_converted(tmp_path):
    net = NETS["residual"]
    compiled, model = trained(net, recipe(head='phase = "qat"'))
    path = tmp_path / "model.onnx"
    qrecipe.export_onnx(compiled, model, path)
    batch = net.batches(2)[1]
    expected = outputs(compiled.convert(model), batch)[0]
    assert sqnr_db(expected, run_onnx(path, batch)[0]) > AGREE_DB


def shapes(path):
    """The sizes of the inputs, and names of those that are free."""
    return [
        [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim]
        for given in onnx.load(path).graph.input
    ]


def test_batches_of_any_size_run(mlp, content, tmp_path):
    compiled, model, batches = mlp
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    ((first, *_),) = shapes(path)
    assert first == "batch"
    converted = compiled.convert(model)
    for few in (batches[1][:1], batches[1][:3]):
        assert sqnr_db(outputs(converted, few)[0], run_onnx(path, few)[0]) > AGREE_DB


def beside_numbers(self, x):
    y = self.fc(x)
    return {"few": [y, x.shape[0], x.size(-1)], "best": (y.argmax(1), "text", None, 1.5)}


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_tensors_are_written_without_what_is_returned_beside_them(executor, tmp_path):
    if executor == "pt2e":
        pytest.importorskip("torchao")
    model, rows = net_of(beside_numbers, fc=nn.Linear(6, 4)), torch.randn(16, 6)
    compiled = qrecipe.compile(model, recipe(), rows, executor=executor)
    calibrated = compiled.prepare()
    qrecipe.calibrate(calibrated, [rows] * 10, progress=silent)
    state = torch.get_rng_state()
    qrecipe.export_onnx(compiled, calibrated, tmp_path / "model.onnx")
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.name for each in onnx.load(tmp_path / "model.onnx").graph.output] == [
        "few.0",
        "best.0",
    ]
    expected = compiled.convert(calibrated)(rows[:5])
    found = run_onnx(tmp_path / "model.onnx", rows[:5])
    assert sqnr_db(expected["few"][0], found[0]) > AGREE_DB
    assert torch.equal(expected["best"][0], found[1])


def test_complex_results_are_pairs_of_numbers_in_the_file(tmp_path):
    model = net_of(lambda self, x: torch.fft.rfft(self.fc(x)), fc=nn.Linear(6, 8))
    rows = torch.randn(16, 6)
    compiled = qrecipe.compile(model, recipe(), rows)
    calibrated = compiled.prepare()
    qrecipe.calibrate(calibrated, [rows] * 10, progress=silent)
    with warnings.catch_warnings():
        warnings.simplefilter("error", qrecipe.QRecipeWarning)
        qrecipe.export_onnx(compiled, calibrated, tmp_path / "model.onnx")
    (found,) = run_onnx(tmp_path / "model.onnx", rows[:5])
    expected = torch.view_as_real(compiled.convert(calibrated)(rows[:5]))
    assert sqnr_db(expected, found) > AGREE_DB


def test_sizes_are_those_of_the_example_where_that_is_asked_for(mlp, tmp_path):
    compiled, model, batches = mlp
    qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx", dynamic_shapes=None)
    assert shapes(tmp_path / "model.onnx") == [list(batches[0].shape)]


def test_a_model_for_one_batch_size_is_exported_for_that_size_and_says_so(tmp_path):
    model = net_of(lambda self, x: self.fc(x).reshape(4, 2, 2), fc=nn.Linear(6, 4))
    batches = [torch.randn(4, 6) for _ in range(10)]
    compiled = qrecipe.compile(model, recipe(), batches[0])
    ready = compiled.prepare()
    qrecipe.calibrate(ready, batches, progress=silent)
    path = tmp_path / "model.onnx"
    with pytest.warns(QRecipeWarning, match="QR235 the exported file only takes batches of 4"):
        qrecipe.export_onnx(compiled, ready, path)
    assert shapes(path) == [[4, 6]]
    assert run_onnx(path, batches[0])[0].shape == (4, 2, 2)


def test_nodes_are_named_after_sites_and_no_path_of_this_machine_is_in_the_file(mlp, content):
    compiled, _, _ = mlp
    nodes = onnx.load_from_string(content).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    computed = {name.rpartition("/")[0] for name in names}
    assert {site.name for site in compiled.plan.sites} <= computed
    assert all(name.count("/") for name in names)
    assert b".py" not in content


@pytest.mark.slow
@pytest.mark.parametrize(
    "asks", [lambda x: x.shape[3] > 20, lambda x: x.shape[3] in {16}, lambda x: -x.shape[3] % 4]
)
def test_sizes_that_the_code_asked_for_cannot_be_dynamic(asks, tmp_path):
    def forward(self, x):
        y = self.conv(x)
        return y * 2 if asks(x) else y

    batch, path = torch.rand(4, 3, 16, 16), tmp_path / "model.onnx"
    compiled = qrecipe.compile(net_of(forward, conv=nn.Conv2d(3, 8, 3)), recipe(), batch)
    model = compiled.prepare()
    qrecipe.calibrate(model, [batch] * 10)
    dim = torch.export.Dim
    with pytest.raises(ArtifactError, match="QR512 the model's code was traced for the example's"):
        qrecipe.export_onnx(compiled, model, path, dynamic_shapes=({3: dim.AUTO},))
    with pytest.raises(ArtifactError, match=r"w.*\(w\)|w as dynamic|of w"):
        qrecipe.export_onnx(compiled, model, path, dynamic_shapes=({3: dim("w", min=8)},))
    assert not path.exists()
    qrecipe.export_onnx(compiled, model, path, dynamic_shapes=({0: dim("batch"), 2: dim.AUTO},))
    other = torch.rand(2, 3, 21, 16)
    assert sqnr_db(compiled.convert(model)(other), run_onnx(path, other)[0]) > AGREE_DB


def test_torchs_decomposed_integers_of_an_embedding_are_a_step_off():
    weight, scale, zero_point = torch.full((1, 4), 0.3), torch.tensor([0.1]), torch.tensor([2.8])
    grid = (0, 0, 255, torch.uint8)
    with quiet():
        right = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.quint8).int_repr()
    other = torch.ops.quantized_decomposed.quantize_per_channel(weight, scale, zero_point, *grid)
    assert (right == 6).all()
    assert (other == 5).all()


class Words(nn.Module):
    """Some rows are of one sign."""

    def __init__(self):
        super().__init__()
        self.words, self.fc = nn.Embedding(30, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.words.weight[:5].add_(5)
            self.words.weight[5:9].sub_(5)

    def forward(self, x):
        return self.fc(self.words(x))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "db"), [("embedding", 100), ("embedding-4", 60)])
def test_weight_only_embeddings_are_exported(kind, db, tmp_path):
    rules = f'[rules]\nglobal = "float"\n[rules.module_type]\n"torch.nn.Embedding" = "{kind}"'
    torch.manual_seed(0)
    x, path = torch.arange(30).view(5, 6), tmp_path / "model.onnx"
    compiled = qrecipe.compile(Words().eval(), recipe(rules), x)
    prepared = compiled.prepare()
    qrecipe.export_onnx(compiled, prepared, path)
    assert sqnr_db(compiled.convert(prepared)(x), run_onnx(path, x)[0]) > db
    assert "UINT8" in tensor_types(path)


def test_dynamic_sites_are_refused_by_name(tmp_path):
    rules = '[rules]\nglobal = "float"\n[rules.module_type]\n"torch.nn.Linear" = "dynamic"'
    compiled, model, _ = prepared("mlp", recipe(rules))
    with pytest.raises(ArtifactError, match=r"QR512 dynamic sites.*fc1, fc2"):
        qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class InParts(nn.Module):
    """Two parts, and code of its own that depends on no values."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.other = Body(), Head(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.backbone(x).mean((2, 3))
        return self.other(self.head(y, scale=1.0)) + len(y.shape)


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_parts_of_a_model_are_exported_with_the_code_around_them(executor, tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(10)]
    roots = recipe_of_roots(["backbone", "head"])
    compiled = qrecipe.compile(InParts().eval(), roots, batches[0], executor=executor)
    model = compiled.prepare()
    qrecipe.calibrate(model, batches, progress=silent)
    path = tmp_path / "model.onnx"
    qrecipe.export_onnx(compiled, model, path)
    names = {node.name.rpartition("/")[0] for node in onnx.load(path).graph.node}
    assert {"backbone.conv", "head.fc1", "head.fc2"} <= names
    converted = compiled.convert(model)
    for batch in (batches[0], batches[1][:3]):
        assert sqnr_db(converted(batch), run_onnx(path, batch)[0]) > AGREE_DB


def test_parts_in_code_that_branches_on_values_are_refused(tmp_path):
    batches = [torch.randn(8, 3, 8, 8) for _ in range(10)]
    compiled = qrecipe.compile(Routed().eval(), recipe_of_roots(["backbone"]), batches[0])
    model = compiled.prepare()
    qrecipe.calibrate(model, batches, progress=silent)
    with pytest.raises(ArtifactError, match=r"QR512 the code around the roots cannot be exported"):
        qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_refused(tmp_path):
    compiled = qrecipe.compile(Branching().eval(), "builtin:x86-dynamic", torch.rand(2, 4))
    with pytest.raises(ArtifactError, match=r"QR512 an untraced model"):
        qrecipe.export_onnx(compiled, compiled.prepare(), tmp_path / "model.onnx")


def test_a_model_that_was_never_calibrated_is_refused(tmp_path):
    net = NETS["mlp"]
    compiled = qrecipe.compile(net.model(), recipe(), net.batches(1)[0])
    with pytest.raises(CalibrationError, match="QR401"):
        qrecipe.export_onnx(compiled, compiled.prepare(), tmp_path / "model.onnx")
    with pytest.raises(CalibrationError, match="QR406"):
        qrecipe.export_onnx(compiled, net.model(), tmp_path / "model.onnx")


def test_a_missing_package_is_named(mlp, tmp_path, monkeypatch):
    compiled, model, _ = mlp
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    with pytest.raises(QRecipeError, match=r"QR602.*onnx.*qrecipe\[onnx\]"):
        qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")


def test_what_the_exporter_cannot_do_is_our_error(mlp, tmp_path, monkeypatch):
    compiled, model, _ = mlp

    def broken(*args, **kwargs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ArtifactError, match=r"QR512.*no such operator"):
        qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")


# --- what is written was run and compared


def turned(reference):
    for module in reference.modules():
        if isinstance(module, ReferenceQuantizedModule):
            module.weight.data = module.weight.data.roll(1, 0)
    return reference


def test_a_conversion_for_export_that_computes_something_else_is_an_error(
    mlp, tmp_path, monkeypatch
):
    compiled, model, _ = mlp
    honest = decomposition.convert
    monkeypatch.setattr(
        decomposition, "convert", lambda *args, **more: turned(honest(*args, **more))
    )
    with pytest.raises(AuditError, match=r"QR414 fc1 computes something else after export"):
        qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_an_error_and_the_former_file_stays(mlp, tmp_path, monkeypatch):
    compiled, model, _ = mlp
    honest = export._content

    def of_other_weights(graph_module, *args):
        for parameter in graph_module.parameters():
            parameter.data = parameter.data.roll(1, 0)
        return honest(graph_module, *args)

    monkeypatch.setattr(export, "_content", of_other_weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the former file")
    says = r"QR414 .* in onnxruntime: .* dB from the quantized model"
    with pytest.raises(AuditError, match=says):
        qrecipe.export_onnx(compiled, model, path)
    assert path.read_bytes() == b"the former file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_run_here_is_written_with_a_warning(
    mlp, content, tmp_path, monkeypatch
):
    compiled, model, batches = mlp

    def fails(*args):
        raise RuntimeError("opset 99 is unknown")

    monkeypatch.setattr(onnx_check, "_run", fails)
    monkeypatch.setattr(export, "_content", lambda *given: content)
    with pytest.warns(QRecipeWarning, match=r"QR415 .* not compared .* opset 99 is unknown"):
        qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")
    assert run_onnx(tmp_path / "model.onnx", batches[0])


def test_without_onnxruntime_the_file_is_written_all_the_same(mlp, content, tmp_path, monkeypatch):
    compiled, model, _ = mlp
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    monkeypatch.setattr(onnx_check, "_run", None)
    monkeypatch.setattr(export, "_content", lambda *given: content)
    qrecipe.export_onnx(compiled, model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


def test_whole_numbers_may_differ_at_ties_and_no_more():
    ranks = torch.arange(1000)
    near, far = ranks.clone(), ranks.roll(1)
    near[:10] += 1
    assert mostly_equal(ranks, near)
    assert not mostly_equal(ranks, far)
    assert not mostly_equal(ranks, ranks[:10])


def test_what_conversion_for_export_does_beside_rounding_is_found(monkeypatch, tmp_path):
    honest = decomposition.convert

    def negated(*args, **kwargs):
        decomposed = honest(*args, **kwargs)
        (output,) = [node for node in decomposed.graph.nodes if node.op == "output"]
        with decomposed.graph.inserting_before(output):
            changed = decomposed.graph.call_function(torch.neg, (output.args[0],))
        output.replace_input_with(output.args[0], changed)
        decomposed.recompile()
        return decomposed

    monkeypatch.setattr(decomposition, "convert", negated)
    batches = [torch.randn(4, 8) for _ in range(12)]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    compiled = qrecipe.compile(model, "builtin:x86-static", batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    with pytest.raises(qrecipe.AuditError, match="changed more than the rounding"):
        qrecipe.export_onnx(compiled, prepared, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
