"""What cannot be quantized as it is given is named, and the cure that is named works."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from plans import net_of, recipe, sites
from runs import silent
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    get_default_qconfig,
    get_default_qconfig_mapping,
    quantize_dynamic,
    quantize_fx,
)
from torch.ao.quantization import prepare as eager_prepare
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import qrecipe
from qrecipe.errors.findings import PlanError, QRecipeError

STATIC = "builtin:x86-static"
DYNAMIC = "builtin:x86-dynamic"
ROWS = torch.zeros(2, 8)


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def rows(count=10):
    return [torch.randn(4, 8) for _ in range(count)]


def message(call):
    with pytest.raises(QRecipeError) as caught:
        call()
    return str(caught.value)


# --- no model

NO_MODELS = {
    "state_dict": (lambda: mlp().state_dict(), "is a state_dict", "load_state_dict"),
    "checkpoint": (lambda: {"epoch": 3, "net": mlp().state_dict()}, "with a state_dict", "'net'"),
    "pickled": (lambda: {"epoch": 3, "model": mlp()}, "with a model in it", "element 'model'"),
    "path": (lambda: "model.pt", "is a path", "load_state_dict"),
    "pair": (lambda: (mlp(), ROWS), "with a model in it", "element 0"),
    "class": (lambda: nn.Linear, "is the class Linear", "an instance"),
    "function": (lambda: mlp, "is a function", "call it"),
    "nothing": (lambda: None, "is a NoneType", "pass the model"),
}

VERBS = {
    "plan": lambda model: qrecipe.plan(model, STATIC, ROWS),
    "compile": lambda model: qrecipe.compile(model, STATIC, ROWS),
    "quantize": lambda model: qrecipe.quantize(model, STATIC, rows(), progress=silent),
    "sensitivity": lambda model: qrecipe.sensitivity(model, STATIC, rows(), progress=silent),
    "tune": lambda model: qrecipe.tune(model, STATIC, rows(), lambda each: 1.0, progress=silent),
    "suggest": lambda model: qrecipe.suggest(model, ROWS),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_is_said_to_be_what_it_is(verb, kind):
    make, what, cure = NO_MODELS[kind]
    text = message(lambda: VERBS[verb](make()))
    assert text.startswith("QR306 the model ")
    assert what in text
    assert cure in text


@pytest.mark.filterwarnings("ignore:QR208")
def test_comparing_and_loading_say_it_too(tmp_path):
    converted = qrecipe.quantize(mlp(), STATIC, rows(), progress=silent)
    qrecipe.save_quantized(converted, tmp_path / "q.safetensors")
    given = mlp().state_dict()
    assert "state_dict" in message(lambda: qrecipe.compare(given, converted, rows()))
    assert "state_dict" in message(
        lambda: qrecipe.load_quantized(tmp_path / "q.safetensors", given)
    )


# --- wrappers


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": (compiled, "OptimizedModule", "_orig_mod"),
    "data parallel": (nn.DataParallel, "DataParallel", "module"),
}
# importing what compiles takes seconds
KINDS = [pytest.param("compiled", marks=pytest.mark.slow), "data parallel"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_a_wrapper_is_named_with_the_attribute_that_holds_it(kind):
    wrap, name, held = WRAPPERS[kind]
    model = wrap(mlp())
    for verb in VERBS.values():
        text = message(lambda verb=verb: verb(model))
        assert f"QR306 the model is wrapped in torch's {name}" in text
        assert f"pass model.{held}" in text
    assert qrecipe.plan(getattr(model, held), STATIC, ROWS).sites


@pytest.mark.parametrize("kind", KINDS)
def test_a_submodule_in_a_wrapper_is_put_back_as_the_hint_says(kind):
    wrap, name, _ = WRAPPERS[kind]
    model = nn.Sequential(wrap(mlp()), nn.ReLU()).eval()
    text = message(lambda: qrecipe.plan(model, STATIC, ROWS))
    assert f"0 is wrapped in torch's {name}" in text
    exec(text.partition("put the original back: ")[2], {"model": model})
    assert len(qrecipe.plan(model, STATIC, ROWS).sites) == 2


def test_a_scripted_submodule_is_named():
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.ReLU()).eval()
    for a_recipe in (STATIC, DYNAMIC):
        text = message(lambda a_recipe=a_recipe: qrecipe.plan(model, a_recipe, ROWS))
        assert "QR306 0 is TorchScript" in text


# --- exported, without values, with hooks, partly in training mode


@pytest.fixture(scope="module")
def exported():
    return torch.export.export(mlp(), (ROWS,))


PROGRAMS = {
    "program": lambda exported: exported,
    "module": lambda exported: exported.module(),
    "unflattened": torch.export.unflatten,
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_of_torch_export_is_said_to_be_one(exported, kind):
    text = message(lambda: qrecipe.plan(PROGRAMS[kind](exported), STATIC, ROWS))
    assert "QR306 the model is a program of torch.export" in text
    assert "pass the model that was exported" in text


def test_a_traced_model_is_none_even_if_it_calls_an_aten_operator():
    model = net_of(lambda self, x: self.a(torch.ops.aten.relu.default(x)), a=nn.Linear(8, 4))
    traced = torch.fx.symbolic_trace(model)
    assert sites(qrecipe.plan(traced, STATIC, ROWS))["a"].verdict == "quantized"


def test_weights_without_values_are_loaded_as_the_hint_says():
    with torch.device("meta"):
        model, other = mlp(), mlp()
    text = message(lambda: qrecipe.plan(model, STATIC, ROWS))
    assert "0.weight is on meta: it has no values" in text
    assert 'model.to_empty(device="cpu")' in text
    assert "load_state_dict(..., assign=True)" in text
    weights = mlp().state_dict()
    model.to_empty(device="cpu").load_state_dict(weights)
    other.load_state_dict(weights, assign=True)
    for each in (model, other):
        assert qrecipe.plan(each, STATIC, ROWS).sites


HOOKS = {
    "after": lambda model: model.register_forward_hook(lambda _, given, result: 2 * result),
    "before": lambda model: model.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_model_itself_that_change_what_it_gives_are_named(kind):
    model = mlp()
    HOOKS[kind](model)
    with torch.no_grad():
        model[2].bias.fill_(1)
    text = message(lambda: qrecipe.plan(model, STATIC, torch.ones(2, 8)))
    assert "computes something other than the model" in text
    assert "hooks of the model itself run around its forward" in text


@pytest.mark.parametrize(
    ("trained", "named"), [((1,), "1 is in training mode"), ((1, 2), "1, 2 are in training mode")]
)
def test_parts_in_training_mode_are_named(trained, named):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 3)
    ).eval()
    model[3].train()  # which changes nothing
    images = torch.zeros(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qrecipe.plan(model, recipe(), images)
    for k in trained:
        model[k].train()
    with pytest.warns(qrecipe.QRecipeWarning, match=f"QR202 {named}"):
        qrecipe.plan(model, recipe(), images)


@pytest.mark.slow
def test_a_module_that_was_compiled_in_place_is_quantized_as_any_other():
    model = mlp()
    model[0].compile(backend="eager")
    assert len(qrecipe.plan(model, STATIC, ROWS).sites) == 2


# --- quantized or prepared before


def prepared_by_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_fx.prepare_fx(mlp(), get_default_qconfig_mapping("x86"), (ROWS,))


def converted_by_torch():
    prepared = prepared_by_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared(torch.randn(4, 8))
        return quantize_fx.convert_fx(prepared)


def dynamic_by_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(mlp(), {nn.Linear})


QUANTIZED = {
    prepared_by_torch: "prepared",
    converted_by_torch: "quantized",
    dynamic_by_torch: "quantized",
    lambda: qrecipe.compile(mlp(), STATIC, ROWS).prepare(): "prepared",
    lambda: qrecipe.compile(mlp(), recipe(head='phase = "qat"'), ROWS).prepare(): "prepared",
    lambda: qrecipe.quantize(mlp(), STATIC, rows(), progress=silent): "quantized",
    lambda: qrecipe.quantize(mlp(), DYNAMIC, example_inputs=ROWS): "quantized",
    lambda: qrecipe.quantize(
        mlp(), recipe(head='backend = "executorch"'), rows(), progress=silent
    ): "quantized",
}


@pytest.mark.parametrize("made", QUANTIZED)
def test_a_model_that_is_quantized_or_prepared_already_is_said_to_be(made):
    model = made()
    for a_recipe in (STATIC, DYNAMIC):
        text = message(lambda a_recipe=a_recipe: qrecipe.plan(model, a_recipe, ROWS))
        assert f"QR306 the model is already {QUANTIZED[made]}: " in text
        assert "pass the original float model" in text


class WrittenForEagerMode(nn.Module):
    """As torchvision.models.quantization has them: still float."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.functions = FloatFunctional()
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.functions.add_relu(self.linear(x), x))


def test_a_model_written_for_eager_mode_is_float_until_it_is_prepared():
    model = WrittenForEagerMode().eval()
    plan = qrecipe.plan(model, STATIC, ROWS)
    assert {site.name: site.verdict for site in plan.sites} == {
        "linear": "quantized",
        ":add": "quantized",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = get_default_qconfig("x86")
        prepared = eager_prepare(model)
    text = message(lambda: qrecipe.plan(prepared, STATIC, ROWS))
    assert "QR306 the model is already prepared: " in text


# --- values


def spoilt(name, value):
    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Embedding(9, 4))
        model.eval().get_submodule(name.rpartition(".")[0])
        with torch.no_grad():
            model.state_dict()[name].view(-1)[0] = value
        return nn.Sequential(*model[:3]) if "3" not in name else model

    return make


MODES = {
    "static": STATIC,
    "dynamic": DYNAMIC,
    "fp16": "builtin:float16-dynamic",
    "weight-only": "builtin:embedding-weight-only",
    "qat": recipe(head='phase = "qat"'),
}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.weight", NAN),
        ("0.bias", -INF),
        ("1.running_var", NAN),
        ("1.running_mean", INF),
        ("3.weight", NAN),
    ],
)
def test_nan_and_infinity_are_named_in_every_mode(mode, name, value):
    text = message(lambda: qrecipe.compile(spoilt(name, value)(), MODES[mode], ROWS))
    assert text.startswith(f"QR306 NaN or infinity in {name}\n")


def test_only_a_few_of_many_names_are_shown():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, NAN)
    text = message(lambda: qrecipe.plan(model, STATIC, ROWS))
    assert "in 0.weight, 0.bias, 1.weight, 1.bias and 8 more" in text


def test_a_mask_of_infinity_in_a_buffer_is_no_fault():
    model = net_of(lambda self, x: (self.fc(x) + self.mask).softmax(-1), fc=nn.Linear(8, 8))
    model.register_buffer("mask", torch.full((8, 8), -INF).triu(1))
    assert qrecipe.plan(model, STATIC, torch.zeros(8, 8)).sites


# --- hooks of torch's own


def old_weight(module):
    old_weight_norm(module)


def old_spectral(module):
    old_spectral_norm(module)


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)


CURES = {
    old_weight: remove_weight_norm,
    old_spectral: remove_spectral_norm,
    pruned: lambda module: prune.remove(module, "weight"),
}


@pytest.mark.parametrize("alter", CURES)
def test_torchs_own_hooks_are_named_with_what_takes_them_off(alter):
    model = mlp()
    alter(model[0])
    before = copy.copy(vars(model[0]))
    reason = sites(qrecipe.plan(model, STATIC, ROWS))["0"].reason
    assert vars(model[0]) == before
    assert "makes it a plain module" in reason
    converted = qrecipe.quantize(model, STATIC, rows(), progress=silent)
    assert converted(ROWS).shape == (2, 4)
    cure = CURES[alter]
    assert getattr(cure, "__name__", "") in reason or "prune.remove" in reason
    cure(model[0])
    assert sites(qrecipe.plan(model, STATIC, ROWS))["0"].verdict == "quantized"


def test_the_weight_that_autograd_computed_is_no_hindrance_to_a_copy():
    model = nn.Sequential(old_weight_norm(nn.Conv2d(3, 8, 3))).eval()
    assert not model[0].weight.is_leaf
    with pytest.raises(PlanError, match="remove_weight_norm makes it a plain module"):
        qrecipe.plan(model, STATIC, torch.zeros(1, 3, 8, 8))
