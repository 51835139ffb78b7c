"""Stored models as a forger writes them, mostly of the net ``mlp``."""

from __future__ import annotations

import json

from artifacts import pack, parts, unpack, with_header
from nets import NETS


def model():
    return NETS["mlp"].model()


def forge(path, tensors, metadata, content):
    """Write a file as its forger would, with the right checksum."""
    path.write_bytes(with_header(tensors, metadata, bytes(content)))


def write_header(path, header, content=b""):
    """A file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def change_plan(path, change):
    tensors, metadata, content = parts(path)
    plan = unpack(metadata["plan"])
    change(plan)
    forge(path, tensors, {**metadata, "plan": pack(plan)}, content)


def change_architecture(path, change):
    tensors, metadata, content = parts(path)
    architecture = unpack(metadata["architecture"])
    change(architecture)
    forge(path, tensors, {**metadata, "architecture": pack(architecture)}, content)


def put(content, entry, value):
    content[entry.data_offsets[0] : entry.data_offsets[1]] = value.numpy().tobytes()
