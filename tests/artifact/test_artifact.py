"""Converted models as files: what comes back is the same to the bit."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import resource
import signal
import struct
from itertools import pairwise, product

import export_recipes
import pytest
import safetensors
import torch
from artifacts import (
    assert_same_outputs,
    header_of,
    outputs,
    parts,
    quantized,
    recipe,
    refused,
    stored,
    trained,
    with_header,
)
from corpus import TORCHVISION, missing
from nets import NETS, UNTRACEABLE, Mlp
from plans import net_of
from random_nets import RandomNet
from random_nets import batches as random_batches
from routed import Routed, recipe_of_roots
from runs import STATIC, half_of, silent
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.errors.findings import (
    ArtifactError,
    QRecipeWarning,
    UnknownNameError,
    UnsupportedError,
)
from qrecipe.execution.engine import engine
from qrecipe.registry import table as registered

ALWAYS = ("residual", "functional", "decoder", "nested", "attention")
"""The nets that are run on every backend in any case."""

SLOW = (("functional", "qnnpack"),)

BACKENDS = [name for name in torch.backends.quantized.supported_engines if name != "none"]


def round_trip(converted, model, path):
    qrecipe.save_quantized(converted, path)
    return qrecipe.load_quantized(path, model)


def blank(net):
    """The architecture alone: its weights have no values at all."""
    return blank_of(net.build)


def blank_of(build):
    with torch.device("meta"):
        return build().eval()


# --- the same to the bit


def _static_runs():
    for name, backend in product(NETS, BACKENDS):
        is_slow = backend != "x86" and (name not in ALWAYS or (name, backend) in SLOW)
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


@pytest.mark.parametrize("name", [*NETS][::3])
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


@pytest.mark.parametrize("backend", ["x86", "fbgemm"])
@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("case", TRAINED)
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


# --- what is in the file


def test_integers_scales_and_zero_points_are_plain_tensors_for_any_reader(tmp_path):
    path = stored(tmp_path, "residual")
    converted = quantized(NETS["residual"], recipe())
    with safetensors.safe_open(path, framework="pt") as file:
        weight = converted.conv1.weight()
        assert torch.equal(file.get_tensor("conv1.weight"), weight.int_repr())
        assert file.get_tensor("conv1.weight").dtype == torch.int8
        assert torch.equal(file.get_tensor("conv1.weight_scale"), weight.q_per_channel_scales())
        zero_points = file.get_tensor("conv1.weight_zero_point")
        assert torch.equal(zero_points, weight.q_per_channel_zero_points())
        assert file.get_tensor("conv1.scale").item() == converted.conv1.scale
        assert file.get_tensor("conv1.zero_point").item() == converted.conv1.zero_point
        assert torch.equal(file.get_tensor("conv1.bias"), converted.conv1.bias())
        metadata = file.metadata()
    assert metadata["fingerprint"] == STATIC.fingerprint
    assert metadata["recipe"] == recipe().to_toml()
    assert json.loads(metadata["versions"])["torch"] == torch.__version__


def test_half_precision_weights_take_two_bytes_and_four_bit_ones_half_a_byte(tmp_path):
    for mode, name, expected in (
        ("dynamic_half", "fc1.weight", ("F16", [16, 6])),
        ("weight_only_4_bits", "embedding.weight", ("U8", [80])),
    ):
        net, rules = MODES[mode]
        text = f'[rules]\nglobal = "float"\n[rules.module_type]\n{rules}'
        entry = header_of(stored(tmp_path, net, recipe(text)))[name]
        assert (entry["dtype"], entry["shape"]) == expected


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    converted = quantized(NETS["residual"], recipe())
    for module, name in (
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "dumps"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (torch, "save"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    path = tmp_path / "model.safetensors"
    loaded = round_trip(converted, NETS["residual"].model(), path)
    assert_same_outputs(converted, loaded, NETS["residual"].batches(1)[0])


class Tied(nn.Module):
    """Two names for one embedding, a shared convolution and a buffer under two names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.first, self.second = nn.GELU(), nn.Bilinear(3, 3, 40)
        self.third = nn.Bilinear(3, 3, 40)
        self.third.weight = self.second.weight

    def forward(self, x):
        y = self.conv(self.relu(self.conv(x))).mean((2, 3))
        return self.second(y, y) + self.third(y, y)


def test_what_is_shared_is_stored_once_and_shared_again(tmp_path):
    batches = [torch.randn(4, 3, 8, 8) for _ in range(10)]
    converted = qrecipe.quantize(Tied().eval(), STATIC, batches, progress=silent)
    assert converted.second.weight is converted.third.weight
    path = tmp_path / "model.safetensors"
    loaded = round_trip(converted, Tied().eval(), path)
    header = header_of(path)
    aliases = json.loads(header["__metadata__"]["aliases"])
    assert aliases == {"third.weight": "second.weight", "conv__call1.weight": "conv.weight"}
    assert not aliases.keys() & header.keys()
    assert loaded.second.weight is loaded.third.weight
    assert_same_outputs(converted, loaded, batches[0])


class Wide(nn.Module):
    """As many weights as ResNet-18 in as many convolutions."""

    def __init__(self):
        super().__init__()
        widths = [3, *[64] * 5, *[128] * 5, *[256] * 5, *[512] * 5]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.fc = nn.Linear(512, 1000)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def test_a_file_of_the_size_of_resnet18_is_two_percent_larger_than_its_tensors_at_most(tmp_path):
    model, batches = Wide().eval(), [torch.randn(1, 3, 4, 4) for _ in range(10)]
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    path = tmp_path / "model.safetensors"
    loaded = round_trip(converted, model, path)
    assert_same_outputs(converted, loaded, batches[0])
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert tensors > 11_000_000
    assert path.stat().st_size <= 1.02 * tensors


# --- writing


def _save_killed_at(size, converted, path):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write beyond the limit kills
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    qrecipe.save_quantized(converted, path)


def test_a_process_killed_half_way_through_writing_leaves_the_old_file_whole(tmp_path):
    path = stored(tmp_path)
    before = path.read_bytes()
    given = len(before) // 2, quantized(NETS["residual"], recipe()), path
    process = multiprocessing.get_context("fork").Process(target=_save_killed_at, args=given)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    (left,) = [file for file in tmp_path.iterdir() if file != path]
    assert left.stat().st_size < len(before), "it was killed in the midst of writing"
    assert path.read_bytes() == before
    loaded = qrecipe.load_quantized(path, NETS["residual"].model())
    assert outputs(loaded, NETS["residual"].batches(1)[0])


class Masked(nn.Module):
    """Buffers and attributes with infinity, and a list that holds a parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.limits = torch.tensor([-1.0, float("inf")])
        self.gains = [self.gain]

    def forward(self, x):
        y = torch.softmax(self.fc(x) + self.mask, -1)
        return y.clamp(self.limits[0], self.limits[1]) * self.gains[0]


def _masked():
    batches = [torch.randn(4, 4) for _ in range(10)]
    return qrecipe.quantize(Masked().eval(), STATIC, batches, progress=silent), batches[0]


def test_masks_and_limits_may_be_infinite(tmp_path):
    converted, batch = _masked()
    other = Masked().eval()
    with torch.no_grad():
        other.gain.fill_(3)
    loaded = round_trip(converted, other, tmp_path / "model.safetensors")
    assert torch.isinf(loaded.mask).any()
    assert_same_outputs(converted, loaded, batch)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("gain", float("inf"), "a value that is not finite in gain"),
        ("gain", float("nan"), "a value that is not finite in gain"),
        ("mask", float("nan"), "NaN in mask"),
    ],
)
def test_parameters_must_be_finite_and_nothing_may_be_nan(name, value, text, tmp_path):
    converted, _ = _masked()
    path = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, path)
    tensors, metadata, content = parts(path)
    start, stop = tensors[name].data_offsets
    content[start:stop] = struct.pack("<f", value) * ((stop - start) // 4)
    path.write_bytes(with_header(tensors, metadata, bytes(content)))
    assert text in refused(path, Masked().eval(), "QR509")
    with torch.no_grad():
        getattr(converted, name).fill_(value)
    with pytest.raises(ArtifactError, match=f"QR511.*{text}"):
        qrecipe.save_quantized(converted, path)


class Around(nn.Module):
    """Code around a root that reads a parameter from a list."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.gain = nn.Parameter(torch.full((4,), 2.0))
        self.gains = [self.gain]

    def forward(self, x):
        return self.body(x) * self.gains[0]


def test_lists_of_parameters_hold_those_of_the_file(tmp_path):
    a_recipe = recipe(head='[fx]\nroots = ["body"]')
    batches = [torch.randn(4, 4) for _ in range(10)]
    converted = qrecipe.quantize(Around().eval(), a_recipe, batches, progress=silent)
    loaded = round_trip(converted, blank_of(Around), tmp_path / "model.safetensors")
    assert loaded.gains[0] is loaded.gain
    assert_same_outputs(converted, loaded, batches[0])


def test_a_disk_that_is_full_is_our_error_and_leaves_no_trace(tmp_path, monkeypatch):
    path = stored(tmp_path)
    before = path.read_bytes()
    converted = quantized(NETS["mlp"], recipe())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"QR502.*no space left on device"):
        qrecipe.save_quantized(converted, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.safetensor", None),
        ("mpl.safetensors", 'did you mean "mlp.safetensors"?'),
        ("missing/mlp.safetensors", None),
        ("mlp.**", None),
    ],
)
def test_of_a_missing_file_the_nearest_one_beside_it_is_named(name, hint, tmp_path):
    stored(tmp_path, "mlp")
    with pytest.raises(ArtifactError, match=r"QR502.*no such file") as caught:
        qrecipe.load_quantized(tmp_path / name, NETS["mlp"].model())
    assert caught.value.findings[0].hint == hint


@pytest.mark.parametrize("name", ["missing/model.safetensors", "folder", "a\0b"])
def test_a_place_that_cannot_be_written_is_our_error(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="QR502"):
        qrecipe.save_quantized(quantized(NETS["mlp"], recipe()), tmp_path / name)


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    link, target = tmp_path / "link.safetensors", tmp_path / "target.safetensors"
    target.write_text("old")
    link.symlink_to(target)
    qrecipe.save_quantized(quantized(NETS["mlp"], recipe()), link)
    assert link.is_symlink()
    assert qrecipe.load_quantized(link, NETS["mlp"].model())


def test_a_model_that_qrecipe_did_not_convert_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="QR501"):
        qrecipe.save_quantized(NETS["mlp"].model(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda model: setattr(model.fc1, "scale", float("nan")), "scale that is not finite"),
        (lambda model: setattr(model.fc1, "zero_point", 300), "zero point outside"),
        (
            lambda model: model.register_buffer("odd", torch.zeros(2, dtype=torch.complex64)),
            "odd.*complex64",
        ),
        (
            lambda model: model.register_buffer("odd", torch.eye(2).to_sparse()),
            "odd.*sparse",
        ),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_written(spoil, text, tmp_path):
    converted = quantized(NETS["mlp"], recipe())
    spoil(converted)
    with pytest.raises(ArtifactError, match=f"(?s)QR511.*{text}"):
        qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_tensor_in_a_list_without_values_on_the_meta_device_asks_for_a_model_on_the_cpu(tmp_path):
    class Listed(Mlp):
        def __init__(self):
            super().__init__()
            self.factors = [torch.arange(4.0)]

        def forward(self, x):
            return super().forward(x) * self.factors[0].sum().item()

    torch.manual_seed(0)
    batches = [torch.randn(4, 6) for _ in range(10)]
    converted = qrecipe.quantize(Listed().eval(), STATIC, batches, progress=silent)
    path = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, path)
    loaded = qrecipe.load_quantized(path, Listed())
    assert torch.equal(loaded(batches[0]), converted(batches[0]))
    with torch.device("meta"):
        empty = Listed()
    with pytest.raises(ArtifactError, match="QR507") as caught:
        qrecipe.load_quantized(path, empty)
    assert caught.value.findings[0].hint.startswith("build the model on the CPU")


def test_a_model_with_a_complex_buffer_is_quantized_and_not_stored(tmp_path):
    def forward(self, x):
        return torch.view_as_real(self.fc(x) * self.phases)

    model = net_of(forward, fc=nn.Linear(6, 6))
    model.register_buffer("phases", torch.polar(torch.ones(6), torch.arange(6.0)))
    batches = [torch.randn(4, 6) for _ in range(10)]
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert converted(batches[0]).shape == (4, 6, 2)
    with pytest.raises(ArtifactError, match=r'QR511.*"phases" is a tensor of torch\.complex64'):
        qrecipe.save_quantized(converted, tmp_path / "model.safetensors")


# --- the machine that loads


def test_a_cpu_without_vnni_is_warned_about_when_loading(tmp_path, monkeypatch):
    path = stored(
        tmp_path,
        "mlp",
        recipe(head='[tensor.activation]\nreduce_range = false\n[lint]\nignore = ["QR226"]'),
    )
    monkeypatch.setattr("qrecipe.artifact.loading.has_vnni", lambda: False)
    with pytest.warns(QRecipeWarning, match="^QR204"):
        qrecipe.load_quantized(path, NETS["mlp"].model())


def test_seven_bits_and_an_accepted_warning_are_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("qrecipe.artifact.loading.has_vnni", lambda: False)
    qrecipe.load_quantized(stored(tmp_path, "mlp"), NETS["mlp"].model())
    accepted = '[tensor.activation]\nreduce_range = false\n[lint]\nignore = ["QR204", "QR226"]'
    qrecipe.load_quantized(stored(tmp_path, "mlp", recipe(head=accepted)), NETS["mlp"].model())


def test_an_engine_that_is_not_here_is_named(tmp_path, monkeypatch):
    path = stored(tmp_path, "mlp", recipe(head='backend = "onednn"'))
    # torch itself is asked for what it supports
    monkeypatch.setattr("qrecipe.artifact.loading.available_engines", lambda: ("fbgemm", "x86"))
    with pytest.raises(ArtifactError, match=r"(?s)QR510.*needs the engine onednn.*fbgemm, x86"):
        qrecipe.load_quantized(path, NETS["mlp"].model())
