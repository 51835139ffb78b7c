"""Files that are damaged, altered or meant for something else: one error that says which."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import zlib
from typing import ClassVar

import hostile
import pytest
import torch
from artifacts import (
    assert_same_outputs,
    header_of,
    pack,
    parts,
    quantized,
    recipe,
    refused,
    stored,
    unpack,
    with_header,
    with_recipe,
)
from guarded import OF_MODULES, Guarded, assert_unchanged, objects_of, state_of, store_guarded
from nets import NETS, Mlp
from places import ROOT
from torch import nn

import qrecipe
from qrecipe.artifact.container import CHECKSUM, Entry
from qrecipe.errors.findings import ArtifactError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound file of the net ``mlp``."""
    return stored(tmp_path_factory.mktemp("good"), "mlp")


@pytest.fixture
def file(good, tmp_path):
    """A copy of it, to be spoilt."""
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(good.read_bytes())
    return path


def forge(path, tensors, metadata, content):
    """Write a file as its forger would, with the right checksum."""
    path.write_bytes(with_header(tensors, metadata, bytes(content)))


def write_header(path, header, content=b""):
    """A file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def model():
    return NETS["mlp"].model()


def test_the_sound_file_loads(good):
    assert qrecipe.load_quantized(good, model())


# --- no whole file


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_says_so(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    text = refused(file, model(), "QR503")
    assert "truncated" in text


def test_bytes_behind_the_tensors_are_refused(file):
    file.write_bytes(file.read_bytes() + b"more")
    assert "4 extra bytes after its tensors" in refused(file, model(), "QR503")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", b"{}", bytes(8), b"\xff" * 64],
    ids=["empty", "zip", "pickle", "json", "zeros", "ones"],
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    refused(path, model(), "QR503")


def test_another_safetensors_file_is_none_of_qrecipe(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    assert "not a quantized model of qrecipe" in refused(path, model(), "QR505")


def test_a_place_without_a_regular_file_is_our_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder", "dangling", "loop", "missing"):
        refused(tmp_path / name, model(), "QR502")
    with pytest.raises(ArtifactError, match="QR502"):
        qrecipe.load_quantized("a\0b", model())


@pytest.mark.parametrize("path", [3, None, b"bytes"])
def test_what_is_no_path_is_our_error(path):
    with pytest.raises(ArtifactError, match="QR502"):
        qrecipe.load_quantized(path, model())
    with pytest.raises(ArtifactError, match="QR502"):
        qrecipe.save_quantized(quantized(NETS["mlp"], recipe()), path)


def test_a_file_that_may_not_be_read_is_our_error(file):
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    file.chmod(0)
    refused(file, model(), "QR502")


# --- headers that lie


def _deep(depth):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "content"),
    [
        (b"[]", b""),
        (b"{", b""),
        (b"\xff\xfe{}", b""),
        (_deep(100), b""),
        (_deep(200_000), b""),
        (b'{"a":' + b'{"a":' * 100_000, b""),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 2 + b'"b":1}', bytes(8)),
        ({"a": {**ONE, "dtype": "F128"}}, bytes(8)),
        ({"a": {**ONE, "dtype": 3}}, bytes(8)),
        ({"a": {**ONE, "shape": [-2]}}, bytes(8)),
        ({"a": {**ONE, "shape": [2.0]}}, bytes(8)),
        ({"a": {**ONE, "shape": [True, 2]}}, bytes(8)),
        ({"a": {**ONE, "shape": [1] * 65}}, bytes(8)),
        ({"a": {**ONE, "shape": [2**40, 2**40]}}, bytes(8)),
        ({"a": {**ONE, "shape": [10**400]}}, bytes(8)),
        ({"a": {**ONE, "shape": [3]}}, bytes(8)),
        ({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8)),
        ({"a": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
        ({"a": {**ONE, "data_offsets": [0, 8, 8]}}, bytes(8)),
        ({"a": {**ONE, "extra": 1}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ({"a": ONE, "b": ONE}, bytes(8)),
        ({"a": ONE, "__metadata__": {"format": 1}}, bytes(8)),
        ({"a": ONE, "__metadata__": []}, bytes(8)),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, content):
    path = tmp_path / "forged.safetensors"
    write_header(path, header, content)
    refused(path, model(), "QR503")


def test_an_absurd_length_of_the_header_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as stream:
        stream.write((2**40).to_bytes(8, "little"))
        stream.truncate(2**41)  # a hole: it takes no room on the disk
    refused(path, model(), "QR503")


# --- damage


def test_a_flipped_bit_anywhere_is_found_and_is_our_error(file):
    content = file.read_bytes()
    choose = random.Random(5)
    for position in [*range(8), *choose.sample(range(8, len(content)), 150)]:
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << choose.randrange(8)
        file.write_bytes(spoilt)
        with pytest.raises(ArtifactError):
            qrecipe.load_quantized(file, model())


def test_altered_integers_say_that_the_checksum_differs(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "checksum differs" in refused(file, model(), "QR504")


def test_an_altered_recipe_says_that_the_checksum_differs(file):
    content = file.read_bytes()
    assert content.count(b'name = \\"x86-static\\"') <= 1
    changed = content.replace(b"moving_average_minmax", b"moving_average_minmay")
    assert changed != content
    file.write_bytes(changed)
    assert "checksum differs" in refused(file, model(), "QR504")


# --- what a forger with a right checksum writes


def test_a_newer_format_is_named(file):
    tensors, metadata, content = parts(file)
    forge(file, tensors, {**metadata, "format": "qrecipe 2"}, content)
    assert "format 2" in refused(file, model(), "QR506")


@pytest.mark.parametrize("key", ["recipe", "fingerprint", "plan", "architecture", "needs"])
@pytest.mark.parametrize("value", ["", "null", "[]", "x" * 1000, "\0", "[" * 50_000])
def test_metadata_that_are_missing_or_nonsense_are_refused(file, key, value):
    tensors, metadata, content = parts(file)
    for text in (value, pack(value)):
        forge(file, tensors, {**metadata, key: text}, content)
        refused(file, model(), "QR505")


def test_a_text_that_unpacks_without_end_is_refused(file):
    tensors, metadata, content = parts(file)
    bomb = base64.b64encode(zlib.compress(bytes(2**26 + 1), 1)).decode()
    forge(file, tensors, {**metadata, "plan": bomb}, content)
    assert "more than" in refused(file, model(), "QR505")


def test_a_recipe_that_extends_another_reads_no_file(file, tmp_path):
    tensors, metadata, content = parts(file)
    text = 'extends = "builtin:x86-static"\n' + metadata["recipe"]
    forge(file, tensors, {**metadata, "recipe": text}, content)
    assert "extends" in refused(file, model(), "QR505")


def test_a_swapped_recipe_or_plan_is_refused(file, tmp_path):
    other = stored(tmp_path, "mlp", recipe('[rules.module_name]\nfc1 = "float"'))
    tensors, metadata, content = parts(file)
    _, others, _ = parts(other)
    for keys in (["recipe"], ["fingerprint"], ["plan"], ["recipe", "fingerprint"]):
        forge(file, tensors, {**metadata, **{key: others[key] for key in keys}}, content)
        refused(file, model(), "QR505")
    keys = ["recipe", "fingerprint", "plan"]
    forge(file, tensors, {**metadata, **{key: others[key] for key in keys}}, content)
    refused(file, model(), "QR507")


def change_plan(path, change):
    tensors, metadata, content = parts(path)
    plan = unpack(metadata["plan"])
    change(plan)
    forge(path, tensors, {**metadata, "plan": pack(plan)}, content)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda plan: plan["sites"].pop(), "QR507"),
        (lambda plan: plan["sites"].append(plan["sites"][0]), "QR505"),
        (lambda plan: plan["sites"].append({**plan["sites"][0], "name": "more"}), "QR507"),
        (lambda plan: plan["sites"][0].update(name="other"), "QR507"),
        (lambda plan: plan["sites"][0].update(members=["fc1"]), "QR507"),
        (lambda plan: plan["sites"][0].update(verdict="float"), "QR505"),
        (lambda plan: plan["sites"][0].update(qconfig=None), "QR505"),
        (lambda plan: plan["sites"][0].update(mode="eager"), "QR505"),
        (lambda plan: plan["sites"][0].update(engine="../../x"), "QR505"),
        (lambda plan: plan["sites"][0].update(engine="onednn"), "QR505"),
        (lambda plan: plan["sites"][0]["qconfig"]["weight"].update(dtype="int3"), "QR505"),
        (lambda plan: plan["sites"][0]["qconfig"]["weight"].update(dtype="float16"), "QR505"),
        (lambda plan: plan["sites"][0]["qconfig"]["weight"].pop("dtype"), "QR505"),
        (
            lambda plan: plan["sites"][0]["qconfig"]["activation"].update(
                observer={"name": "placeholder", "x": 1}
            ),
            "QR505",
        ),
        (lambda plan: plan.update(backend="qnnpack"), "QR505"),
        (lambda plan: plan.update(phase="qat"), "QR505"),
        (lambda plan: plan.update(needs_vnni=True), "QR505"),
        (lambda plan: plan.update(is_for_export=True), "QR505"),
    ],
)
def test_a_forged_plan_is_refused(file, change, code):
    change_plan(file, change)
    refused(file, model(), code)


FLOAT = {"verdict": "float", "mode": None, "qconfig": None, "input": None}


def test_a_plan_that_the_recipe_does_not_give_is_refused(file, tmp_path):
    other = stored(tmp_path, "mlp", recipe('[rules]\nglobal = "float"'))
    _, metadata, _ = parts(file)
    tensors, others, content = parts(other)
    text = json.dumps(unpack(others["plan"])).replace(
        others["fingerprint"], metadata["fingerprint"]
    )
    own = {key: metadata[key] for key in ("recipe", "fingerprint")}
    forge(file, tensors, {**others, **own, "plan": pack(text)}, content)
    assert "the plan lists other rules" in refused(file, model(), "QR505")


@pytest.mark.parametrize("torch_release", [torch.__version__, "2.9.0"])
@pytest.mark.parametrize(
    ("change", "text", "in_any_release"),
    [
        ({**FLOAT, "reason": None}, "float without a reason", True),
        ({**FLOAT, "reason": "no kernel"}, "float, not quantized", False),
        ({"rule": {"tier": "global", "key": "", "says": "half"}}, "was decided by", True),
    ],
)
def test_a_site_is_what_its_rule_asks(file, change, text, in_any_release, torch_release):
    def forged(plan):
        site = plan["sites"][0]
        rule = change.get("rule", {})
        site.update({**change, "rule": {**site["rule"], **rule}})

    change_plan(file, forged)
    tensors, metadata, content = parts(file)
    versions = {**json.loads(metadata["versions"]), "torch": torch_release}
    forge(file, tensors, {**metadata, "versions": json.dumps(versions)}, content)
    if in_any_release or torch_release == torch.__version__:
        assert text in refused(file, model(), "QR505")
    else:
        refused(file, model(), "QR507")  # what a backend can do may differ, but not the graph


def change_architecture(path, change):
    tensors, metadata, content = parts(path)
    architecture = unpack(metadata["architecture"])
    change(architecture)
    forge(path, tensors, {**metadata, "architecture": pack(architecture)}, content)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda found: found["parts"].clear(), "QR505"),
        (lambda found: found["parts"].append(found["parts"][0]), "QR505"),
        (lambda found: found["parts"][0].update(path="fc1"), "QR505"),
        (lambda found: found["parts"][0].update(path="nowhere"), "QR505"),
        (lambda found: found["parts"][0].update(constants={"x": 1}), "QR507"),
        (lambda found: found["parts"][0]["nodes"].pop(), "QR507"),
        (lambda found: found["parts"][0]["nodes"][1].update(value="other"), "QR507"),
        (lambda found: found["parts"][0]["nodes"][1].update(value="maybe"), "QR505"),
        (lambda found: found["parts"][0]["nodes"][1].update(call="x"), "QR507"),
        (lambda found: found["modules"].pop("fc1"), "QR507"),
        (lambda found: found["modules"].update(fc9="Linear()"), "QR507"),
        (lambda found: found["graphs"].clear(), "QR507"),
        (lambda found: found.update(more=1), "QR505"),
    ],
)
def test_a_forged_architecture_is_refused(file, change, code):
    change_architecture(file, change)
    refused(file, model(), code)


class Steered(Mlp):
    """Its arguments choose how often it loops, and whether it writes."""

    written: ClassVar = []

    def forward(self, x, times: int = 1, note: str | None = None):
        for _ in range(times):
            x = super().forward(x)[..., [0, 1, 2, 3, 0, 1]]
        if note is not None:
            self.written.append(note)
        return x


def store_steered(path, **given):
    batches = [{"x": batch, **given} for batch in NETS["mlp"].batches(1)]
    converted = qrecipe.quantize(Steered().eval(), "builtin:x86-dynamic", example_inputs=batches[0])
    qrecipe.save_quantized(converted, path)
    return converted, batches[0]


@pytest.mark.parametrize(
    "constants",
    [
        *({"times": 10**12}, {"times": 1, "note": "evil"}, {"times": 1.0}, {"times": True}),
        *({"times": None}, {"note": None}, {"times": 1, "note": None, "self": 1}),
    ],
)
def test_a_file_does_not_steer_forward(constants, tmp_path):
    path = tmp_path / "steered.safetensors"
    store_steered(path)
    change_architecture(path, lambda found: found["parts"][0].update(constants=constants))
    refused(path, Steered().eval(), "QR507")
    assert Steered.written == []


def test_other_constants_than_the_defaults_are_loaded_with_consent(tmp_path):
    path = tmp_path / "steered.safetensors"
    converted, batch = store_steered(path, times=2)
    text = refused(path, Steered().eval(), "QR507")
    assert '"times" is 2 in the file, 1 here' in text
    assert "constants={'times': 2}" in text
    loaded = qrecipe.load_quantized(path, Steered().eval(), constants={"times": 2})
    assert_same_outputs(loaded, converted, batch)
    others = {"3 here": {"times": 3}, 'did you mean "times"': {"time": 2}, "mapping": ["times"]}
    for said, other in others.items():
        with pytest.raises(ArtifactError, match="QR507") as caught:
            qrecipe.load_quantized(path, Steered().eval(), constants=other)
        assert said in str(caught.value)


def put(content, entry, value):
    content[entry.data_offsets[0] : entry.data_offsets[1]] = value.numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("fc1.weight_scale", float("nan"), "not finite in fc1.weight_scale"),
        ("fc1.weight_scale", float("inf"), "not finite"),
        ("fc1.weight_scale", 0.0, "not positive"),
        ("fc1.weight_scale", 1e200, "not finite"),
        ("fc1.weight_scale", 1e-200, "not positive"),
        ("fc1.weight_scale", -1.0, "not positive"),
        ("fc1.weight_scale", 1e-40, "out of range"),
        ("fc1.scale", 2e36, "out of range"),
        ("fc1_1_input_scale_0", 1e-38, "out of range"),
        ("fc1.weight_zero_point", 1000, "outside -128..127 in fc1.weight_zero_point"),
        ("fc1.scale", float("nan"), "not finite in fc1.scale"),
        ("fc1.bias", float("nan"), "not finite in fc1.bias"),
        ("fc1.zero_point", 2**40, "outside 0..255"),
        ("fc1.zero_point", -128, "outside 0..255"),
        ("fc1_1_input_scale_0", float("nan"), "not finite in fc1_1_input_scale_0"),
        ("fc1_1_input_zero_point_0", -500, "outside"),
        ("fc1_1_input_zero_point_0", -128, "outside 0..255"),
    ],
)
def test_scales_and_zero_points_that_cannot_be_are_refused(file, name, value, text):
    tensors, metadata, content = parts(file)
    dtype = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64}[tensors[name].dtype]
    put(content, tensors[name], torch.full(tensors[name].shape, value, dtype=dtype))
    forge(file, tensors, metadata, content)
    assert text in refused(file, model(), "QR509")


def without(tensors, content, name):
    """The table and the bytes without one tensor."""
    kept = dict(tensors)
    start, stop = kept.pop(name).data_offsets
    size = stop - start
    moved = {
        other: Entry(
            dtype=entry.dtype,
            shape=entry.shape,
            data_offsets=tuple(o - size if o >= stop else o for o in entry.data_offsets),
        )
        for other, entry in kept.items()
    }
    return moved, content[:start] + content[stop:]


def test_a_missing_tensor_is_named(file):
    tensors, metadata, content = parts(file)
    left, rest = without(tensors, content, "fc1.bias")
    forge(file, left, metadata, rest)
    assert "fc1.bias is missing" in refused(file, model(), "QR508")


def test_a_tensor_too_many_is_named(file):
    tensors, metadata, content = parts(file)
    end = len(content)
    more = Entry(dtype="I8", shape=(3,), data_offsets=(end, end + 3))
    forge(file, {**tensors, "evil": more}, metadata, content + bytes(3))
    assert "evil is not in the model" in refused(file, model(), "QR508")


@pytest.mark.parametrize(
    ("dtype", "shape"), [("I8", (6, 16)), ("I8", (96,)), ("U8", (16, 6)), ("I16", (16, 3))]
)
def test_a_tensor_of_another_shape_or_dtype_is_named(file, dtype, shape):
    tensors, metadata, content = parts(file)
    offsets = tensors["fc1.weight"].data_offsets
    tensors["fc1.weight"] = Entry(dtype=dtype, shape=shape, data_offsets=offsets)
    forge(file, tensors, metadata, content)
    assert "fc1.weight is" in refused(file, model(), "QR508")


def test_a_shape_that_is_larger_than_the_model_is_refused_before_memory_is_taken(tmp_path):
    path = stored(tmp_path, "mlp")
    tensors, metadata, content = parts(path)
    end, size = len(content), 2**36
    huge = Entry(dtype="I8", shape=(size,), data_offsets=(end, end + size))
    metadata[CHECKSUM] = "0" * 64
    table = {name: entry.model_dump() for name, entry in {**tensors, "huge": huge}.items()}
    write_header(path, {"__metadata__": metadata, **table}, bytes(content))
    assert "truncated" in refused(path, model(), "QR503")


def test_tensors_of_another_model_are_refused_before_they_are_read(file):
    tensors, metadata, content = parts(file)
    end, size = len(content), 2**36
    huge = Entry(dtype="I8", shape=(size,), data_offsets=(end, end + size))
    table = {name: entry.model_dump() for name, entry in {**tensors, "huge": huge}.items()}
    write_header(file, {"__metadata__": metadata, **table}, bytes(content))
    os.truncate(file, file.stat().st_size + size)  # a hole: it takes no room on the disk
    assert "huge is not in the model" in refused(file, model(), "QR508")


class Switched(Mlp):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x):
        return torch.where(self.mask, super().forward(x), -9.0)


def test_truth_values_are_0_or_1(tmp_path):
    path = tmp_path / "switched.safetensors"
    batch = NETS["mlp"].batches(1)[0]
    converted = qrecipe.quantize(Switched().eval(), "builtin:x86-dynamic", example_inputs=batch)
    qrecipe.save_quantized(converted, path)
    tensors, metadata, content = parts(path)
    put(content, tensors["mask"], torch.tensor([2, 255, 0, 1], dtype=torch.uint8))
    forge(path, tensors, metadata, content)
    assert "neither 0 nor 1 in mask" in refused(path, Switched().eval(), "QR509")


@pytest.mark.parametrize(
    "aliases",
    [
        {"fc1.weight": "fc2.weight"},
        {"more": "nothing"},
        {"more": "fc1.weight"},
        {"a": "b", "b": "a"},
    ],
)
def test_aliases_of_nothing_and_to_nothing_are_refused(file, aliases):
    tensors, metadata, content = parts(file)
    forge(file, tensors, {**metadata, "aliases": json.dumps(aliases)}, content)
    with pytest.raises(ArtifactError, match=r"QR505|QR508"):
        qrecipe.load_quantized(file, model())


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 1, 2], [-1, 0], ["a"], [10**30, 0]])
def test_layouts_that_are_none_are_refused(file, order):
    tensors, metadata, content = parts(file)
    forge(file, tensors, {**metadata, "layouts": json.dumps({"fc1.weight": order})}, content)
    refused(file, model(), "QR505")


# --- a model that is another one


def test_a_file_of_another_model_names_the_first_differences(tmp_path):
    path = stored(tmp_path, "residual")
    text = refused(path, model(), "QR507")
    assert "another architecture" in text
    assert "conv1: Conv2d(" in text
    assert "nothing in the model" in text
    assert "more" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda net: setattr(net.conv1, "stride", (2, 2)), "stride=(2, 2)"),
        (lambda net: setattr(net.conv1, "padding", (0, 0)), "padding=(0, 0)"),
        (lambda net: setattr(net, "pool", nn.MaxPool2d(3)), "kernel_size=3"),
        (lambda net: setattr(net, "pool", nn.AvgPool2d(2)), "AvgPool2d"),
        (lambda net: setattr(net.bn1, "eps", 0.1), "eps=0.1"),
        (lambda net: setattr(net, "relu", nn.ReLU6()), "ReLU6"),
        (lambda net: setattr(net, "fc", nn.Linear(8, 6)), "out_features=6"),
        (lambda net: setattr(net, "more", nn.Linear(8, 6)), "more: nothing in the file"),
        (lambda net: net.layer1.append(nn.Identity()), "layer1.2: nothing in the file"),
    ],
)
def test_settings_that_weights_do_not_tell_are_compared(tmp_path, change, text):
    path = stored(tmp_path, "residual")
    net = NETS["residual"].model()
    change(net)
    assert text in refused(path, net, "QR507")


class Scaled(Mlp):
    """The same modules, and another number in forward."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return super().forward(x * self.factor)


def test_another_forward_is_refused_and_shown(tmp_path):
    path = tmp_path / "model.safetensors"
    batches = NETS["mlp"].batches()
    converted = qrecipe.quantize(Scaled(0.5).eval(), recipe(), batches, progress=lambda *_: None)
    qrecipe.save_quantized(converted, path)
    assert qrecipe.load_quantized(path, Scaled(0.5).eval())
    text = refused(path, Scaled(0.25).eval(), "QR507")
    assert "0.5) in the file" in text
    assert "0.25) in the model" in text


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(x) if x.sum() > 0 else self.fc1(x)


class Uncopyable(Mlp):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


class Broken(Mlp):
    def forward(self, x):
        raise KeyError("broken")


@pytest.mark.parametrize(
    "other",
    [Untraceable(), Uncopyable(), Broken(), nn.Module(), nn.Sequential(), "model", None, Mlp],
    ids=["untraceable", "uncopyable", "broken", "module", "empty", "text", "none", "class"],
)
def test_what_is_no_such_model_is_our_error(file, other):
    refused(file, other, "QR507")


def test_a_text_of_the_file_cannot_steer_the_terminal(file):
    tensors, metadata, content = parts(file)
    forge(file, tensors, {**metadata, "format": "qrecipe 2\x1b[31m"}, content)
    with pytest.raises(ArtifactError) as caught:
        qrecipe.load_quantized(file, model())
    assert "\x1b" not in str(caught.value)
    change_architecture(file, lambda found: found["modules"].update({"\x1b[31m": "\x1b[0m"}))
    with pytest.raises(ArtifactError) as caught:
        qrecipe.load_quantized(file, model())
    assert "\x1b" not in str(caught.value)


@pytest.fixture
def meddled(monkeypatch):
    """Calls a function once a file has been checked, before its tensors are read."""

    def meddle(function):
        from qrecipe.artifact import loading

        original = loading._fill

        def fill(*args):
            function()
            return original(*args)

        monkeypatch.setattr(loading, "_fill", fill)

    return meddle


def test_a_file_that_is_replaced_while_it_is_read_does_not_matter(file, meddled, tmp_path):
    other = stored(tmp_path, "mlp", recipe('[rules.module_name]\nfc1 = "float"'))
    expected = qrecipe.load_quantized(file, model())
    meddled(lambda: os.replace(other, file))
    loaded = qrecipe.load_quantized(file, model())
    assert not other.exists()
    assert_same_outputs(loaded, expected, NETS["mlp"].batches(1)[0])


def test_bytes_that_change_while_they_are_read_are_refused(file, meddled):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    meddled(lambda: file.write_bytes(content))
    assert "checksum differs" in refused(file, model(), "QR504")


def test_a_file_that_is_cut_while_it_is_read_is_refused(file, meddled):
    meddled(lambda: os.truncate(file, file.stat().st_size - 100))
    assert "checksum differs" in refused(file, model(), "QR504")


# --- what a file must not touch


def test_attacks_with_sound_checksums_touch_nothing(guarded, tmp_path):
    good = guarded.read_bytes()
    found = [hostile.attack_case(random.Random(seed), tmp_path, good) for seed in range(60)]
    codes = {code for each in found for code in each.codes}
    assert {"accepted", "QR505", "QR507"} <= codes


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    path = tmp_path_factory.mktemp("guarded") / "guarded.safetensors"
    return store_guarded(path)


def write_with_fx(path, good, table):
    """A file whose recipe has that ``[fx]`` table."""
    tensors, metadata, content = parts(good)
    text = f"{metadata['recipe']}\n[fx]\n{table}\n"
    forge(path, tensors, with_recipe(metadata, text), content)


OF_THE_MODEL = ("boom", "helper", "forward", "fc1.weight", "nothing", "fc1", "fc2")


@pytest.mark.parametrize("name", [*OF_THE_MODEL, *OF_MODULES])
def test_no_name_in_a_recipe_reaches_into_the_model(name, guarded, tmp_path):
    path, net = tmp_path / "evil.safetensors", Guarded().eval()
    write_with_fx(path, guarded, f"preserved_attributes = [{json.dumps(name)}]")
    before = state_of(net)
    refused(path, net, "QR507")
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    "table",
    [
        'roots = ["boom"]',
        'roots = ["_modules"]',
        'roots = ["fc1"]',
        'non_traceable_module_name = ["boom"]',
        'non_traceable_module_class = ["builtins.object"]',
    ],
)
def test_what_plan_refuses_for_a_model_is_refused_in_a_file(table, guarded, tmp_path):
    path, net = tmp_path / "evil.safetensors", Guarded().eval()
    write_with_fx(path, guarded, table)
    if table.startswith("roots"):
        root = table.split('"')[1]
        change_architecture(path, lambda found: found["parts"][0].update(path=root))
    before = state_of(net)
    text = refused(path, net, "QR507")
    assert "fx." in text
    assert_unchanged(net, before)


@pytest.mark.parametrize("names", [[], ["class_names", "KINDS", "LEVELS", "offset", "notes"]])
def test_a_loaded_model_has_nothing_of_the_given_one(names, guarded, tmp_path):
    path, net = tmp_path / "model.safetensors", Guarded().eval()
    write_with_fx(path, guarded, f"preserved_attributes = {json.dumps(names)}")
    before = state_of(net)
    loaded = qrecipe.load_quantized(path, net)
    assert_unchanged(net, before)
    assert not objects_of(net).keys() & objects_of(loaded).keys()
    assert all(getattr(loaded, name, None) is not None for name in names)
    assert not objects_of(Guarded.LEVELS).keys() & objects_of(loaded).keys()
    with torch.no_grad():
        loaded.gain.fill_(0)
        loaded.offset.fill_(0)
    loaded.register_forward_hook(lambda *_: pytest.fail("a hook of the loaded model was run"))
    net(NETS["mlp"].batches(1)[0])
    assert_unchanged(net, before)


class Selfish(Mlp):
    def __deepcopy__(self, memo):
        return self


def test_a_model_whose_copy_is_itself_is_not_written_to(file):
    net = Selfish().train()
    before = state_of(net)
    assert "copied" in refused(file, net, "QR507")
    assert_unchanged(net, before)
    with pytest.raises(qrecipe.PlanError, match="same modules"):
        qrecipe.plan(net.eval(), recipe(), NETS["mlp"].batches(1)[0])


def test_header_and_metadata_are_read_without_torch():
    code = """
import sys
import qrecipe.artifact.container, qrecipe.artifact.metadata
assert not {"torch", "numpy", "safetensors"} & sys.modules.keys()
"""
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_header_is_plain_json(good):
    header = header_of(good)
    assert header["fc1.weight"]["dtype"] == "I8"
    assert header["__metadata__"]["format"] == "qrecipe 1"
