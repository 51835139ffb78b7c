"""Files of converted models: what is in them, how they are written, and who may load them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import struct
from itertools import pairwise

import pytest
import safetensors
import torch
from artifacts import (
    assert_same_outputs,
    blank_of,
    header_of,
    outputs,
    parts,
    quantized,
    recipe,
    refused,
    round_trip,
    stored,
    with_header,
)
from nets import NETS, Mlp
from plans import net_of
from runs import STATIC, silent
from torch import nn

import qrecipe
from qrecipe.errors.findings import (
    ArtifactError,
    QRecipeWarning,
)

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
    for net, rule, name, expected in (
        ("mlp", '"torch.nn.Linear" = "half"', "fc1.weight", ("F16", [16, 6])),
        ("tagger", '"torch.nn.Embedding" = "embedding-4"', "embedding.weight", ("U8", [80])),
    ):
        text = f'[rules]\nglobal = "float"\n[rules.module_type]\n{rule}'
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


class OneNumber(Mlp):
    """The operands are single numbers that no scale or zero point could be."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor(-1.0))
        self.register_buffer("factor", torch.tensor([-0.5]))
        self.register_buffer("count", torch.tensor(1000))

    def forward(self, x):
        return (super().forward(x) + self.shift) * self.factor + self.count


def test_operands_of_a_single_number_are_not_taken_for_scales(tmp_path):
    batches = NETS["mlp"].batches()
    converted = qrecipe.quantize(OneNumber().eval(), recipe(), batches, progress=False)
    loaded = round_trip(converted, OneNumber().eval(), tmp_path / "model.safetensors")
    assert_same_outputs(loaded, converted, batches[0])


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
