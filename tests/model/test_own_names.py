"""Attributes and submodules of a model may be called what torch's graph modules call their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plans import net_of, recipe
from torch import fx, nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.model.graph_names import inner, is_taken, outer

TAKEN = ("meta", "graph", "code", "_code", "_graph", "print_readable", "recompile", "to_folder")
BATCHES = [torch.randn(16, 6, generator=torch.Generator().manual_seed(n)) for n in range(10)]
X = BATCHES[0]
ROOTS = '[fx]\nroots = ["part"]\n'


class Net(nn.Module):
    """Its layers, a parameter, a buffer and a plain tensor all have names of a graph module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in TAKEN:
            setattr(self, name, nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
        self.shape_env = nn.Parameter(torch.randn(6))
        self.register_buffer("_tracer_cls", torch.randn(6))
        self.add_submodule = torch.ones(6)

    def forward(self, x):
        for name in TAKEN:
            x = getattr(self, name)(x) + self._tracer_cls
        return x * self.shape_env + self.add_submodule


class Around(nn.Module):
    """The model around a root: it reads what it holds under such names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.meta, self.code = Net(), "v1", {"sign": 1}
        self.graph = nn.Linear(6, 6)

    def forward(self, x):
        y = self.part(self.graph(x))
        return y * self.code["sign"] if self.meta == "v1" else -y


class Untraceable(Around):
    """Goes module by module."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


SUBJECTS = {
    "traced whole": (Net, recipe()),
    "a root": (Around, recipe(ROOTS)),
    "module by module": (Untraceable, recipe(base="builtin:x86-dynamic")),
}


def quantized(kind):
    make, a_recipe = SUBJECTS[kind]
    return make().eval(), qrecipe.quantize(make().eval(), a_recipe, BATCHES)


@pytest.mark.parametrize("kind", SUBJECTS)
def test_a_model_with_such_names_is_quantized_and_computes_what_it_did(kind):
    model, converted = quantized(kind)
    assert sqnr_db(model(X), converted(X)) > 20
    if kind != "traced whole":
        assert (converted.meta, converted.code) == ("v1", {"sign": 1})


@pytest.mark.parametrize("kind", SUBJECTS)
def test_the_plan_and_the_state_have_the_models_own_names(kind):
    _, converted = quantized(kind)
    stem = "" if kind == "traced whole" else "part."
    plan = qrecipe.provenance(converted).plan
    for name in TAKEN:
        assert f'"{stem}{name}.0"' in plan
        assert any(key.startswith(f"{stem}{name}.0.") for key in converted.state_dict())
    assert f"{stem}shape_env" in converted.state_dict()
    assert not any("_qrecipe" in key for key in converted.state_dict())


def test_rules_reach_operations_by_such_names():
    rules = recipe('[rules.module_name]\n"meta" = "float"\n"graph.0" = "float"\n')
    verdicts = {site.name: site.verdict for site in qrecipe.plan(Net().eval(), rules, X).sites}
    assert (verdicts["meta.0"], verdicts["graph.0"]) == ("float", "float")
    assert verdicts["code.0"] == "quantized"


@pytest.mark.parametrize("kind", SUBJECTS)
def test_copies_and_files_keep_what_belongs_to_the_model(kind, tmp_path):
    model, converted = quantized(kind)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    copied = copy.deepcopy(loaded)
    copied.load_state_dict(converted.state_dict())
    for each in (loaded, copied):
        assert torch.equal(each(X), converted(X))
        assert qrecipe.provenance(each) == qrecipe.provenance(converted)
        assert list(each.state_dict()) == list(converted.state_dict())
    assert b"_qrecipe" not in (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_pickled_model_keeps_its_provenance():
    converted = qrecipe.quantize(nn.Sequential(nn.Linear(6, 6)).eval(), recipe(), BATCHES)
    again = pickle.loads(pickle.dumps(converted))
    assert qrecipe.provenance(again) == qrecipe.provenance(converted)


def test_a_model_with_such_names_is_trained_and_its_state_goes_into_another_copy():
    compiled = qrecipe.compile(Net().eval(), recipe(head='phase = "qat"'), X)
    prepared = compiled.prepare()
    for batch in BATCHES:
        prepared(batch).sum().backward()
    other = copy.deepcopy(prepared)
    other.load_state_dict(prepared.state_dict())
    assert "meta.0.weight" in other.state_dict()
    assert torch.equal(compiled.convert(other)(X), compiled.convert(prepared)(X))


def test_a_copy_of_a_prepared_model_is_still_known():
    compiled = qrecipe.compile(Net().eval(), recipe(), X)
    prepared = copy.deepcopy(compiled.prepare())
    qrecipe.calibrate(prepared, BATCHES)
    assert qrecipe.provenance(compiled.convert(copy.deepcopy(prepared)))


@pytest.mark.parametrize("name", ["graph", "meta", "code"])
def test_an_attribute_that_a_graph_module_needs_cannot_be_preserved(name):
    model = net_of(lambda self, x: self.fc(x), fc=nn.Linear(6, 6))
    setattr(model, name, {"edges": 3})
    rules = recipe(head=f'[fx]\npreserved_attributes = ["{name}"]\n')
    with pytest.raises(qrecipe.PlanError, match=f'"{name}" has a name that torch') as caught:
        qrecipe.plan(model, rules, X)
    assert caught.value.findings[0].code == "QR314"
    model.edges = getattr(model, name)
    rules = recipe(head='[fx]\npreserved_attributes = ["edges"]\n')
    assert qrecipe.quantize(model, rules, BATCHES).edges == {"edges": 3}


def test_a_module_is_preserved_unless_the_model_calls_it():
    model = net_of(lambda self, x: self.fc(x), fc=nn.Linear(6, 6), more=nn.Linear(6, 2))
    rules = recipe(head='[fx]\npreserved_attributes = ["more"]\n')
    assert torch.equal(qrecipe.quantize(model, rules, BATCHES).more(X), model.more(X))
    rules = recipe(head='[fx]\npreserved_attributes = ["more", "fc"]\n')
    with pytest.raises(qrecipe.PlanError, match=r'QR314 .*"fc" is a module that the model calls'):
        qrecipe.quantize(model, rules, BATCHES)


@pytest.mark.parametrize("value", ["v1", nn.Linear(6, 6)], ids=["attribute", "submodule"])
def test_the_one_name_that_torchs_quantization_writes_to_is_refused(value):
    model = net_of(lambda self, x: self.fc(x), fc=nn.Sequential(nn.Linear(6, 6)))
    model.fc.qconfig = value
    with pytest.raises(
        qrecipe.PlanError, match=r"QR306 the attribute fc\.qconfig is overwritten by torch"
    ):
        qrecipe.plan(model, recipe(), X)


@pytest.mark.parametrize("value", ["v1", nn.Linear(6, 6)], ids=["attribute", "submodule"])
def test_the_one_name_that_qrecipe_writes_to_is_refused_of_the_model_itself(value):
    model = net_of(lambda self, x: self.fc(x), fc=nn.Sequential(nn.Linear(6, 6)))
    model.fc._qrecipe = "nothing is written there"
    qrecipe.plan(model, recipe(), X)
    model._qrecipe = value
    with pytest.raises(
        qrecipe.PlanError, match=r"^QR306 the attribute _qrecipe is reserved for qrecipe"
    ):
        qrecipe.plan(model, recipe(), X)
    with pytest.raises(qrecipe.QRecipeError, match="QR501"):
        qrecipe.provenance(model)


def test_torchs_graph_modules_cannot_have_submodules_of_these_names():
    for name, forward in {
        "meta": lambda self, x: self.meta(x),
        "graph": lambda self, x: self.graph(x),
    }.items():
        model = net_of(forward, **{name: nn.Linear(6, 6)})
        with pytest.raises(TypeError, match="as child module"):
            fx.symbolic_trace(model)


def test_a_name_inside_a_graph_leads_back_to_the_models_own():
    assert not is_taken("conv1")
    for target in ("meta.0", "conv1.meta", "graph"):
        assert outer(inner(target)) == target
