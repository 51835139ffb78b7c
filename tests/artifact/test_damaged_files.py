"""Files that are cut, damaged, or never were stored models: one error that says which."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from artifacts import (
    assert_same_outputs,
    header_of,
    quantized,
    recipe,
    refused,
    stored,
)
from forgery import model, write_header
from nets import NETS
from places import ROOT

import qrecipe
from qrecipe.errors.findings import ArtifactError


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


# --- while it is read


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


# --- what reads it


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
