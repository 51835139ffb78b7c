"""Stored models are exported as they were when they were calibrated, without data."""

from __future__ import annotations

import copy

import export_recipes
import pytest
import torch
from artifacts import blank, recipe, trained
from corpus import TORCHVISION, missing
from nets import NETS
from plans import net_of
from routed import recipe_of_roots
from runs import half_of, silent
from shares import every
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.artifact.carried import carried
from qrecipe.artifact.export.stored import Stored
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import ArtifactError, QRecipeError
from qrecipe.execution.fx import recovered
from qrecipe.model.call import Inputs
from qrecipe.model.nested import tensors_in
from qrecipe.pipeline import exportable
from qrecipe.registry import table as registered
from qrecipe.runtimes import executorch

pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.usefixtures("operators_listed_once"),
    pytest.mark.filterwarnings("ignore:.*QR232"),
]

FLOAT = '[rules]\nglobal = "float"\n[rules.module_type]\n'


def calibrated(model, a_recipe, batches, **options):
    compiled = qrecipe.compile(model, a_recipe, batches[0], target_cpu="vnni", **options)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    return compiled, prepared


def assert_same(compiled, prepared, architecture, batch, path):
    """What exporters get of the stored model gives the same bits as what they get in process."""
    qrecipe.save_quantized(compiled.convert(prepared), path)
    own = exportable(compiled, prepared)
    found = Stored.load(path, architecture, Inputs.from_batch(batch)).exportable()
    pairs = list(zip(tensors_in(own.output), tensors_in(found.output), strict=True))
    assert pairs
    assert all(torch.equal(one, other) for one, other in pairs)
    return own.graph_module, found.graph_module


ALWAYS = ("residual", "functional", "squeeze_excite", "recurrent")


def _slow_unless(names, always):
    return [
        name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.mark.parametrize("name", _slow_unless(NETS, ALWAYS))
def test_exporters_get_the_model_that_was_calibrated(name, tmp_path):
    net = NETS[name]
    batches = net.batches()
    compiled, prepared = calibrated(net.model(), recipe(), batches)
    own, found = assert_same(compiled, prepared, blank(net), batches[0], tmp_path / "net")
    if name != "functional":  # whose weights have other names
        assert own.code == found.code


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "googlenet"])
def test_so_do_they_of_real_architectures(name, tmp_path):
    net = TORCHVISION[name]
    batches = net.batches()
    compiled, prepared = calibrated(net.model(), "builtin:x86-static-minmax", batches)
    own, found = assert_same(compiled, prepared, net.model(), batches[0], tmp_path / "net")
    assert own.code == found.code


@pytest.mark.parametrize("name", _slow_unless(NETS, ("depthwise", "norms")))
def test_so_do_they_where_a_random_half_is_float(name, tmp_path):
    net = NETS[name]
    batches = net.batches()
    compiled, prepared = calibrated(net.model(), half_of(net, seed=5), batches)
    assert_same(compiled, prepared, blank(net), batches[0], tmp_path / "net")


TRAINED = [name for name in NETS if name != "shared_conv_two_norms"]
"""Training cannot share one convolution between two norms."""


@pytest.mark.parametrize("name", _slow_unless(TRAINED, ("residual",)))
@pytest.mark.filterwarnings("ignore:.*QR203")
def test_so_do_they_after_training(name, tmp_path):
    net = NETS[name]
    compiled, prepared = trained(net, recipe(head='phase = "qat"'))
    assert_same(compiled, prepared, blank(net), net.batches(1)[0], tmp_path / "net")


BACKENDS = ["onednn", "qnnpack", "executorch", "tensorrt"]


@pytest.mark.parametrize("backend", every(2, BACKENDS))
@pytest.mark.parametrize("name", _slow_unless(NETS, ("functional",)))
def test_so_do_they_of_each_backend(name, backend, tmp_path):
    net = NETS[name]
    named = {"executorch": export_recipes.EXECUTORCH, "tensorrt": export_recipes.TENSORRT}
    text = qrecipe.parse_recipe(named[backend]) if backend in named else None
    batches = net.batches()
    a_recipe = text or recipe(head=f'backend = "{backend}"')
    compiled, prepared = calibrated(net.model(), a_recipe, batches)
    assert_same(compiled, prepared, blank(net), batches[0], tmp_path / "net")


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_deep_models_are_judged_by_what_they_give_without_rounding_tensors(executor, tmp_path):
    pytest.importorskip("torchao")
    net = NETS["norms"]
    batches = net.batches()
    compiled, prepared = calibrated(net.model(), recipe(), batches, executor=executor)
    assert_same(compiled, prepared, blank(net), batches[0], tmp_path / "net")
    own = exportable(compiled, prepared).float_output
    given = Inputs.from_batch(batches[0])
    found = Stored.load(tmp_path / "net", blank(net), given).exportable()
    assert sqnr_db(own, found.float_output) > 45
    assert sqnr_db(own, found.output) < 40


CASES = {
    "conv1d": (lambda self, x: torch.conv1d(x, self.w, self.b), {"w": (4, 3, 3), "b": (4,)}),
    "turned": (lambda self, x: nn.functional.linear(x, self.w.t()), {"w": (9, 5)}),
    "twice": (
        lambda self, x: nn.functional.linear(nn.functional.linear(x, self.w).relu(), self.w),
        {"w": (9, 9)},
    ),
    "clamped": (lambda self, x: self.last(nn.functional.relu6(self.first(x) * 9)), {}),
    "silu": (lambda self, x: self.last(nn.functional.silu(self.first(x))), {}),
    "rolled": (lambda self, x: self.last(torch.roll(self.first(x).sigmoid(), 1, 1)), {}),
}


@pytest.mark.parametrize("name", every(2, CASES))
def test_so_do_they_of_functions_and_of_what_only_moves_or_clamps(name, tmp_path):
    torch.manual_seed(0)
    forward, shapes = CASES[name]
    layers = {} if shapes else {"first": nn.Linear(9, 9), "last": nn.Linear(9, 4)}
    model = net_of(forward, **layers)
    for parameter, shape in shapes.items():
        setattr(model, parameter, nn.Parameter(torch.randn(shape)))
    batches = [torch.randn(2, 3, 9) for _ in range(10)]
    compiled, prepared = calibrated(model, "builtin:x86-static-minmax", batches)
    architecture = copy.deepcopy(model)
    for parameter in architecture.parameters():
        parameter.data.zero_()
    assert_same(compiled, prepared, architecture, batches[0], tmp_path / "net")


class Rows(nn.Module):
    """Rows of one sign have a zero point that is no integer of eight bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bag = nn.Embedding(30, 6), nn.EmbeddingBag(30, 6, mode="sum")
        with torch.no_grad():
            self.table.weight[:5].add_(5)
            self.bag.weight[5:9].sub_(5)

    def forward(self, x):
        return self.table(x).sum(1) + self.bag(x)


@pytest.mark.parametrize(("kind", "within"), [("embedding", 1e-5), ("embedding-4", 2e-2)])
def test_embeddings_give_what_their_kernels_give(kind, within, tmp_path):
    rules = f'"torch.nn.Embedding" = "{kind}"\n"torch.nn.EmbeddingBag" = "{kind}"'
    x = torch.arange(30).view(5, 6)
    compiled, prepared = calibrated(Rows().eval(), recipe(FLOAT + rules), [x])
    assert_same(compiled, prepared, Rows().eval(), x, tmp_path / "net")
    found, expected = exportable(compiled, prepared).output, compiled.convert(prepared)(x)
    # kernels of 4 bits have scales of 16
    assert (found - expected).abs().max() < within


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        return self.other(self.head(x) * 2)


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_so_do_they_of_parts(executor, tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    batches = [torch.randn(4, 6) for _ in range(10)]
    compiled, prepared = calibrated(
        Around().eval(), recipe_of_roots(["head"]), batches, executor=executor
    )
    assert_same(compiled, prepared, Around().eval(), batches[0], tmp_path / "net")


TRANSFORMS = {
    "equalize": '[transform.equalize]\nchains = [["one", "two"]]\n',
    "smooth": '[transform.smooth]\nalpha = 0.7\ngroups = "auto"\n',
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*QR2(03|07|08|34)")
def test_so_do_they_of_transformed_models(name, tmp_path):
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.two(torch.relu(self.one(x + 0))),
        one=nn.Linear(16, 16),
        two=nn.Linear(16, 4),
    )
    batches = [torch.randn(8, 16) * torch.tensor([32.0] + [1.0] * 15) for _ in range(10)]
    a_recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static-minmax"\n{TRANSFORMS[name]}'
    )
    float_ = qrecipe.transform(model, a_recipe, batches)
    compiled, prepared = calibrated(float_, a_recipe, batches)
    plan = compiled.plan
    assert any(plan.chains[0].exponents[0]) if plan.chains else plan.groups[0].is_product
    assert_same(compiled, prepared, copy.deepcopy(model), batches[0], tmp_path / "net")


def test_plugins_are_not_needed(tmp_path):
    class Unheard(MinMaxObserver):
        def calculate_qparams(self):
            scale, zero_point = super().calculate_qparams()
            return scale * 1.1, zero_point

    qrecipe.register_observer("unheard_of_again")(Unheard)
    head = '[tensor.activation]\nobserver = "unheard_of_again"'
    net = NETS["mlp"]
    batches = net.batches()
    try:
        compiled, prepared = calibrated(net.model(), recipe(head=head), batches)
        qrecipe.save_quantized(compiled.convert(prepared), tmp_path / "net")
        own = exportable(compiled, prepared)
    finally:
        registered.remove("observer", "unheard_of_again")
    found = Stored.load(tmp_path / "net", blank(net), Inputs.from_batch(batches[0])).exportable()
    assert torch.equal(own.output, found.output)


REFUSED = {
    "dynamic": ("mlp", '"torch.nn.Linear" = "dynamic"', "fx", "QR512 dynamic sites"),
    "untraced": ("mlp", '"torch.nn.Linear" = "dynamic"', "eager", "QR512 an untraced model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_process_is_refused_with_the_same_words(name, tmp_path):
    net, rules, executor, says = REFUSED[name]
    batches = NETS[net].batches()
    compiled, prepared = calibrated(
        NETS[net].model(), recipe(FLOAT + rules), batches, executor=executor
    )
    qrecipe.save_quantized(compiled.convert(prepared), tmp_path / "net")
    with pytest.raises(ArtifactError, match=says) as own:
        exportable(compiled, prepared)
    with pytest.raises(ArtifactError) as found:
        qrecipe.export_stored(
            tmp_path / "net", blank(NETS[net]), tmp_path / "net.onnx", batches[0], to="onnx"
        )
    assert own.value.findings == found.value.findings
    assert not (tmp_path / "net.onnx").exists()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a net that was stored by FX graph mode, by PT2E, and for ExecuTorch."""
    folder, net = tmp_path_factory.mktemp("stored"), NETS["mlp"]
    recipes = {
        "fx": recipe(),
        "pt2e": recipe(head='executor = "pt2e"'),
        "executorch": qrecipe.parse_recipe(f'executor = "pt2e"\n{export_recipes.EXECUTORCH}'),
    }
    for name, a_recipe in recipes.items():
        compiled, prepared = calibrated(net.model(), a_recipe, net.batches())
        qrecipe.save_quantized(compiled.convert(prepared), folder / name)
        if name == "fx":
            qrecipe.export_onnx(compiled, prepared, folder / "calibrated.onnx")
    return folder


def export(stored, path, to):
    net = NETS["mlp"]
    qrecipe.export_stored(stored, blank(net), path, net.batches(1)[0], to=to)


def test_the_file_of_a_stored_model_is_that_of_the_calibrated_one(stored, tmp_path):
    export(stored / "fx", tmp_path / "net.onnx", "onnx")
    assert (tmp_path / "net.onnx").read_bytes() == (stored / "calibrated.onnx").read_bytes()


FILES = {
    "onnx": ("net.onnx", "onnxscript", "ONNX"),
    "openvino": ("net.xml", "openvino", "OpenVINO"),
    "pt2": ("net.pt2", "torchao", "torch's archive"),
    "aoti": ("net.pt2", "torchao", "torch's archive"),
    "pte": ("net.pte", "executorch", "ExecuTorch"),
}
SLOW = [*(("pt2e", to) for to in ("onnx", "openvino", "pt2", "aoti")), ("executorch", "pte")]


@pytest.mark.parametrize(
    ("source", "to"),
    [("fx", "openvino"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)],
)
def test_each_target_is_written_from_a_stored_model(source, to, stored, tmp_path):
    name, package, kind = FILES[to]
    pytest.importorskip(package)
    export(stored / source, tmp_path / name, to)
    found = carried(tmp_path / name)
    origin = qrecipe.provenance(qrecipe.load_quantized(stored / source, blank(NETS["mlp"])))
    assert (found.kind, found.origin.plan) == (kind, origin.plan)


@pytest.mark.parametrize("to", ["pt2", "aoti"])
def test_targets_that_need_a_program_refuse_a_stored_model_of_another_executor(
    to, stored, tmp_path
):
    with pytest.raises(ArtifactError, match=r'QR512 (?s:.)*executor = "pt2e"'):
        export(stored / "fx", tmp_path / "net.pt2", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 5), torch.ones(2, 6).long(), (torch.randn(2, 6),) * 2]
)
def test_inputs_that_the_model_cannot_take_are_a_finding(inputs, stored, tmp_path):
    with pytest.raises(QRecipeError, match="QR307"):
        qrecipe.export_stored(
            stored / "fx", NETS["mlp"].model(), tmp_path / "net.onnx", inputs, to="onnx"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_target_is_told_the_nearest(stored, tmp_path):
    with pytest.raises(ArtifactError, match=r'QR512 "onx" (?s:.)*did you mean "onnx"'):
        export(stored / "fx", tmp_path / "net.onnx", "onx")


def test_what_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(executorch, "MODULES", ("executorch_of_nobody",))
    with pytest.raises(QRecipeError, match="QR602"):
        export(tmp_path / "nothing", tmp_path / "net.pte", "pte")


@pytest.mark.parametrize("forgotten", ["_take_module", "_fix_weight"])
def test_a_model_that_cannot_be_made_again_is_refused(forgotten, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(recovered, forgotten, lambda *given: None)
    with pytest.raises(ArtifactError, match=r"QR512 .*cannot be rebuilt for export: fc"):
        export(stored / "fx", tmp_path / "net.onnx", "onnx")


def test_a_range_that_is_nowhere_is_named(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(recovered, "_scale", lambda number: 1.5)
    with pytest.raises(ArtifactError, match=r"QR512 .*rebuilt for export: (?s:.)*fc"):
        export(stored / "fx", tmp_path / "net.onnx", "onnx")
