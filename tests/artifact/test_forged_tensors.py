"""Tensors with a right checksum that no quantized model has."""

from __future__ import annotations

import json
import os

import pytest
import torch
from artifacts import (
    parts,
    refused,
    stored,
)
from forgery import forge, model, put, write_header
from nets import NETS, Mlp

import qrecipe
from qrecipe.artifact.container import CHECKSUM, Entry
from qrecipe.errors.findings import ArtifactError


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
