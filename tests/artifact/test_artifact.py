"""Converted models as files: what comes back is the same to the bit."""

from __future__ import annotations

import copy
import json
from itertools import product

import export_recipes
import pytest
import torch
from artifacts import (
    assert_same_outputs,
    blank,
    header_of,
    quantized,
    recipe,
    refused,
    round_trip,
    stored,
    trained,
)
from corpus import TORCHVISION, missing
from nets import NETS, UNTRACEABLE
from random_nets import RandomNet
from random_nets import batches as random_batches
from routed import Routed, recipe_of_roots
from runs import STATIC, half_of, silent
from shares import every
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.errors.findings import (
    QRecipeWarning,
    UnknownNameError,
    UnsupportedError,
)
from qrecipe.execution.engine import engine
from qrecipe.registry import table as registered

ALWAYS = ("residual", "decoder")
"""The nets that are run on every backend in any case; half of the others take turns."""

BACKENDS = [name for name in torch.backends.quantized.supported_engines if name != "none"]


# --- the same to the bit


def _static_runs():
    for (at, name), backend in product(enumerate(NETS), BACKENDS):
        has_turn = at % 4 == 3 and backend == BACKENDS[(at + 1) % len(BACKENDS)]
        is_slow = name not in ALWAYS and not has_turn
        yield pytest.param(name, backend, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("name", "backend"), list(_static_runs()))
def test_static_models_come_back_to_the_bit_on_every_backend(name, backend, tmp_path):
    net = NETS[name]
    try:
        converted = quantized(net, recipe(head=f'backend = "{backend}"'))
    except UnsupportedError:
        pytest.skip(f"{backend} has no kernel for it")
    loaded = round_trip(converted, blank(net), tmp_path / "model.safetensors")
    with engine(backend):
        for batch in net.batches(2):
            assert_same_outputs(converted, loaded, batch)


@pytest.mark.parametrize("name", every(2, [*NETS][::3]))
def test_models_with_a_random_half_left_float_come_back_to_the_bit(name, tmp_path):
    net = NETS[name]
    converted = quantized(net, half_of(net, seed=3))
    loaded = round_trip(converted, blank(net), tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, net.batches(2)[1])


MODES = {
    "dynamic": ("mlp", '"torch.nn.Linear" = "dynamic"'),
    "dynamic_per_tensor": ("mlp", '"torch.nn.Linear" = "dynamic-plain"'),
    "dynamic_half": ("mlp", '"torch.nn.Linear" = "half"'),
    "lstm": ("recurrent", '"torch.nn.LSTM" = "dynamic-plain"'),
    "lstm_half": ("recurrent", '"torch.nn.LSTM" = "half"'),
    "weight_only": ("tagger", '"torch.nn.Embedding" = "embedding"'),
    "weight_only_4_bits": ("tagger", '"torch.nn.Embedding" = "embedding-4"'),
    "mixed": ("tagger", '"torch.nn.Embedding" = "embedding"\n"torch.nn.Linear" = "dynamic"'),
}


@pytest.mark.parametrize(
    ("mode", "backend"), [(mode, ("x86", "fbgemm")[at % 2]) for at, mode in enumerate(MODES)]
)
def test_dynamic_weight_only_and_mixed_models_come_back_to_the_bit(mode, backend, tmp_path):
    name, rules = MODES[mode]
    net = NETS[name]
    text = f'[rules]\nglobal = "float"\n[rules.module_type]\n{rules}'
    converted = quantized(net, recipe(text, head=f'backend = "{backend}"'))
    modes = {site["mode"] for site in json.loads(qrecipe.provenance(converted).plan)["sites"]}
    assert modes - {None}
    loaded = round_trip(converted, blank(net), tmp_path / "model.safetensors")
    with engine(backend):
        assert_same_outputs(converted, loaded, net.batches(2)[1])


class Cells(nn.Module):
    """Cells, several layers, both directions: all that torch packs in a way of its own."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.cell = nn.LSTMCell(8, 8)
        self.gru_cell = nn.GRUCell(8, 4)

    def forward(self, x):
        y, _ = self.lstm(x)
        y, _ = self.gru(y)
        h, _ = self.cell(y[:, -1])
        return self.gru_cell(h)


def test_recurrent_cells_layers_and_directions_come_back_to_the_bit(tmp_path):
    kinds = ("LSTM", "GRU", "LSTMCell", "GRUCell")
    rules = "".join(f'"torch.nn.{kind}" = "dynamic-plain"\n' for kind in kinds)
    text = f'[rules]\nglobal = "float"\n[rules.module_type]\n{rules}'
    x = torch.randn(3, 5, 6)
    try:
        converted = qrecipe.quantize(Cells().eval(), recipe(text), example_inputs=x)
    except UnsupportedError:
        text = text.replace('"torch.nn.GRUCell" = "dynamic-plain"\n', "")
        converted = qrecipe.quantize(Cells().eval(), recipe(text), example_inputs=x)
    loaded = round_trip(converted, Cells().eval(), tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, x)


@pytest.mark.parametrize("seed", range(4))
def test_random_nets_come_back_to_the_bit(seed, tmp_path):
    torch.manual_seed(seed)
    backend = BACKENDS[seed % len(BACKENDS)]
    try:
        converted = qrecipe.quantize(
            RandomNet(seed).eval(),
            recipe(head=f'backend = "{backend}"'),
            random_batches(),
            progress=silent,
        )
    except UnsupportedError:
        return
    loaded = round_trip(converted, RandomNet(seed).eval(), tmp_path / "model.safetensors")
    with engine(backend):
        assert_same_outputs(converted, loaded, random_batches(1)[0])


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("name", TORCHVISION)
def test_architectures_of_torchvision_come_back_to_the_bit(name, tmp_path):
    net = TORCHVISION[name]
    batches = net.batches(3)
    with pytest.warns(QRecipeWarning):
        converted = qrecipe.quantize(net.model(), STATIC, batches, progress=silent)
    torch.manual_seed(7)
    loaded = round_trip(converted, net.model(), tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, batches[1])


@pytest.mark.parametrize(
    ("name", "a_recipe"), [("cnn_lstm", "builtin:cnn-lstm"), ("cells", "builtin:x86-dynamic")]
)
def test_built_in_recipes_for_recurrent_nets_come_back_to_the_bit(name, a_recipe, tmp_path):
    net = NETS[name]
    converted = qrecipe.quantize(net.model(), a_recipe, net.batches(), progress=silent)
    loaded = round_trip(converted, blank(net), tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, net.batches(2)[1])


@pytest.mark.filterwarnings("ignore:QR210")
def test_models_that_cannot_be_traced_come_back_to_the_bit(tmp_path):
    recipes = '["builtin:x86-dynamic", "builtin:embedding-weight-only"]'
    a_recipe = qrecipe.parse_recipe(f'format = 1\nname = "both"\nextends = {recipes}')
    tokens = UNTRACEABLE.batches(1)[0]
    converted = qrecipe.quantize(UNTRACEABLE.model(), a_recipe, example_inputs=tokens)
    assert '"executor": "eager"' in qrecipe.provenance(converted).plan
    path = tmp_path / "model.safetensors"
    loaded = round_trip(converted, blank(UNTRACEABLE), path)
    assert_same_outputs(converted, loaded, tokens)
    assert type(loaded) is type(converted)
    other = UNTRACEABLE.model()
    other.attention = nn.Identity()
    refused(path, other, "QR507")


TRAINED = {
    "all": ("residual", ""),
    "learnable": (
        "residual",
        '[tensor.activation]\nfake_quant = { name = "learnable", use_grad_scaling = true }\n'
        '[lint]\nignore = ["QR203"]\n',
    ),
    "float_norm": ("residual", '[rules.module_name]\nconv1 = "float"\n'),
    "gates": ("squeeze_excite", ""),
    "transposed": ("decoder", ""),
    "functions": ("functional", ""),
    "embedding": ("tagger", ""),
}


@pytest.mark.parametrize("case", every(2, TRAINED))
def test_models_of_quantization_aware_training_come_back_to_the_bit(case, tmp_path):
    name, text = TRAINED[case]
    net = NETS[name]
    compiled, prepared = trained(net, recipe(head=f'phase = "qat"\n{text}'))
    converted = compiled.convert(prepared)
    loaded = round_trip(converted, blank(net), tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, net.batches(2)[1])


def test_detours_to_another_engine_are_taken_again(tmp_path):
    def build():
        return nn.Sequential(nn.ConvTranspose2d(8, 4, 3), nn.ReLU()).eval()

    batches = [torch.randn(4, 8, 6, 6) for _ in range(10)]
    converted = qrecipe.quantize(build(), STATIC, batches, progress=silent)
    assert json.loads(qrecipe.provenance(converted).plan)["sites"][0]["engine"] == "fbgemm"
    path = tmp_path / "model.safetensors"
    loaded = round_trip(converted, build(), path)
    assert_same_outputs(converted, loaded, batches[0])
    assert json.loads(header_of(path)["__metadata__"]["needs"])["engines"] == ["x86", "fbgemm"]


def test_reference_models_for_export_come_back_to_the_bit(tmp_path):
    a_recipe = qrecipe.parse_recipe(export_recipes.EXECUTORCH)
    net, batches = export_recipes.net, export_recipes.batches()
    converted = qrecipe.quantize(net(), a_recipe, batches, progress=silent)
    loaded = round_trip(converted, net(), tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, batches[0])


def test_models_of_parts_keep_the_rest_and_its_weights(tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(10)]
    a_recipe = recipe_of_roots(["backbone", "head"], '"head.fc2" = "float"')
    converted = qrecipe.quantize(Routed().eval(), a_recipe, batches, progress=silent)
    loaded = round_trip(converted, Routed().eval(), tmp_path / "model.safetensors")
    assert type(loaded) is Routed
    assert_same_outputs(converted, loaded, batches[0])


def test_plugins_are_not_needed(tmp_path):
    class Unheard(MinMaxObserver):
        pass

    net = NETS["residual"]
    path = tmp_path / "model.safetensors"
    qrecipe.register_observer("unheard_of")(Unheard)
    try:
        text = '[tensor.activation]\nobserver = "unheard_of"'
        converted = quantized(net, recipe(head=text))
        qrecipe.save_quantized(converted, path)
    finally:
        registered.remove("observer", "unheard_of")
    with pytest.raises(UnknownNameError):
        qrecipe.parse_recipe(qrecipe.provenance(converted).recipe)
    loaded = qrecipe.load_quantized(path, net.model())
    assert qrecipe.provenance(loaded) == qrecipe.provenance(converted)
    assert_same_outputs(converted, loaded, net.batches(2)[1])


def test_the_models_own_weights_do_not_matter_and_stay_as_they_are(tmp_path):
    net = NETS["residual"]
    converted = quantized(net, recipe())
    model = net.model()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    loaded = round_trip(converted, model, tmp_path / "model.safetensors")
    assert_same_outputs(converted, loaded, net.batches(1)[0])
    assert all(torch.isnan(p).all() for p in model.parameters())
    mine = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert not mine & {t.untyped_storage().data_ptr() for t in loaded.parameters()}


def test_a_models_forward_is_traced_and_never_run(tmp_path):
    net = NETS["mlp"]
    path = stored(tmp_path, "mlp")

    class Wary(type(net.model())):
        def forward(self, x):
            assert isinstance(x, torch.fx.Proxy), "the model was run"
            return super().forward(x)

    assert_same_outputs(
        qrecipe.load_quantized(path, Wary().eval()), quantized(net, recipe()), net.batches(1)[0]
    )


def test_a_model_in_training_mode_is_loaded_in_eval_mode_and_stays_in_its_own(tmp_path):
    net = NETS["residual"]
    model = net.model().train()
    loaded = qrecipe.load_quantized(stored(tmp_path), model)
    assert not any(module.training for module in loaded.modules())
    assert all(module.training for module in model.modules())


def test_float_weights_in_channels_last_keep_their_layout(tmp_path):
    net = NETS["residual"]
    model = net.model().to(memory_format=torch.channels_last)
    a_recipe = recipe(head='[rules.module_name]\n"layer1.**" = "float"\n')
    converted = qrecipe.quantize(model, a_recipe, net.batches(), progress=silent)
    loaded = round_trip(converted, net.model(), tmp_path / "model.safetensors")
    weight = loaded.get_submodule("layer1.0.conv2").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.requires_grad
    assert_same_outputs(converted, loaded, net.batches(2)[1])


def test_attributes_are_those_of_the_model_that_is_passed(tmp_path):
    net = NETS["mlp"]
    model = net.model()
    model.class_names = ["cat", "dog"]
    a_recipe = recipe(head='[fx]\npreserved_attributes = ["class_names"]')
    converted = qrecipe.quantize(model, a_recipe, net.batches(), progress=silent)
    other = net.model()
    other.class_names = ["Katze", "Hund"]
    loaded = round_trip(converted, other, tmp_path / "model.safetensors")
    assert loaded.class_names == ["Katze", "Hund"]


def test_a_loaded_model_knows_where_it_comes_from_and_is_saved_alike(tmp_path):
    net = NETS["residual"]
    converted = quantized(net, recipe())
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    loaded = round_trip(copy.deepcopy(converted), net.model(), one)
    assert qrecipe.provenance(loaded) == qrecipe.provenance(converted)
    qrecipe.save_quantized(loaded, other)
    assert other.read_bytes() == one.read_bytes()


def test_the_engine_and_the_random_state_are_left_as_they_were(tmp_path):
    path = stored(tmp_path, "mlp", recipe(head='backend = "fbgemm"'))
    former, state = torch.backends.quantized.engine, torch.get_rng_state()
    qrecipe.load_quantized(path, NETS["mlp"].model())
    assert torch.backends.quantized.engine == former
    fresh = NETS["mlp"].model()
    torch.set_rng_state(state)
    qrecipe.load_quantized(path, fresh)
    assert torch.equal(torch.get_rng_state(), state)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.lstm(x)[0] if x.sum() < 1e6 else x)


@pytest.mark.filterwarnings("ignore:QR210")
def test_loading_an_untraced_model_keeps_random_numbers(tmp_path):
    model, path = Branching().eval(), tmp_path / "model.safetensors"
    converted = qrecipe.quantize(model, "builtin:x86-dynamic", example_inputs=torch.ones(2, 3, 6))
    qrecipe.save_quantized(converted, path)
    before = torch.get_rng_state()
    qrecipe.load_quantized(path, model)
    assert torch.equal(torch.get_rng_state(), before)
