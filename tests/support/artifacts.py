"""Stored models for tests: written, read back, and taken apart by hand."""

from __future__ import annotations

import base64
import io
import json
import zlib

import pytest
import torch
from nets import NETS
from runs import HEAD, silent, tensors_of

import qrecipe
from qrecipe.artifact.container import opened, write_tensors
from qrecipe.errors.findings import ArtifactError
from qrecipe.model.call import Inputs

MODES = """
[tensor.dynamic]
dtype = "uint8"
is_dynamic = true
[tensor.half]
dtype = "float16"
[tensor.half-dynamic]
dtype = "float16"
is_dynamic = true
[tensor.embedding]
observer = "per_channel_minmax"
dtype = "uint8"
qscheme = "per_channel_affine_float_qparams"
[tensor.embedding-4]
observer = "per_channel_minmax"
dtype = "uint4"
qscheme = "per_channel_affine_float_qparams"
[tensor.plain-weight]
observer = "minmax"
dtype = "int8"
qscheme = "per_tensor_symmetric"
[qconfig.dynamic]
weight = "weight"
activation = "dynamic"
[qconfig.dynamic-plain]
weight = "plain-weight"
activation = "dynamic"
[qconfig.half]
weight = "half"
activation = "half-dynamic"
[qconfig.embedding]
weight = "embedding"
[qconfig.embedding-4]
weight = "embedding-4"
"""
"""Qconfigs beside the static one, named as what they give."""


def recipe(rules="", *, head=""):
    return qrecipe.parse_recipe(f"{HEAD}{head}\n{MODES if rules else ''}\n{rules}\n")


def quantized(net, a_recipe):
    return qrecipe.quantize(
        net.model(), a_recipe, net.batches(), progress=silent, target_cpu="vnni"
    )


def trained(net, a_recipe, steps=3):
    """A converted model after a few steps of quantization-aware training."""
    batches = net.batches()
    compiled = qrecipe.compile(net.model(), a_recipe, batches[0])
    prepared = compiled.prepare().train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-5)
    for batch in batches[:steps]:
        optimizer.zero_grad()
        sum(output.square().mean() for output in outputs(prepared, batch)).backward()
        optimizer.step()
    return compiled, prepared


_stored: dict[tuple[str, str], bytes] = {}


def stored(folder, name="residual", a_recipe=None):
    """The path of a stored toy model, which is quantized once for all tests."""
    a_recipe = a_recipe or recipe()
    path, key = folder / f"{name}.safetensors", (name, a_recipe.to_toml())
    if key not in _stored:
        qrecipe.save_quantized(quantized(NETS[name], a_recipe), path)
        _stored[key] = path.read_bytes()
    path.write_bytes(_stored[key])
    return path


def round_trip(converted, model, path):
    """The model as it comes back from a file."""
    qrecipe.save_quantized(converted, path)
    return qrecipe.load_quantized(path, model)


def blank(net):
    """The architecture alone: its weights have no values at all."""
    return blank_of(net.build)


def blank_of(build):
    with torch.device("meta"):
        return build().eval()


def outputs(model, batch):
    return tensors_of(Inputs.from_batch(batch).call(model))


def assert_same_outputs(one, other, batch):
    pairs = list(zip(outputs(one, batch), outputs(other, batch), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


def parts(path):
    """Table of tensors, metadata, and the bytes of the tensors."""
    with opened(path) as file:
        header = file.header
    return dict(header.tensors), dict(header.metadata), bytearray(path.read_bytes()[header.start :])


def with_header(tensors, metadata, content):
    """A file as its forger would write it, with the right checksum."""
    stream = io.BytesIO()
    write_tensors(
        stream, tensors, metadata, lambda name: content[slice(*tensors[name].data_offsets)]
    )
    return stream.getvalue()


def pack(value):
    """A text, or a value as JSON, as the metadata have it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.b64encode(zlib.compress(text.encode(), 1)).decode()


def unpack(text):
    return json.loads(zlib.decompress(base64.b64decode(text)))


def with_recipe(metadata, text):
    """The metadata with another recipe, and with its fingerprint wherever that is."""
    former, own = metadata["fingerprint"], qrecipe.parse_recipe(text).fingerprint
    plan = json.loads(json.dumps(unpack(metadata["plan"])).replace(former, own))
    return {**metadata, "recipe": text, "fingerprint": own, "plan": pack(plan)}


def header_of(path):
    """The header of a file as JSON has it."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def refused(path, model, code):
    """The text of the error that loading ends in."""
    with pytest.raises(ArtifactError) as caught:
        qrecipe.load_quantized(path, model)
    assert {finding.code for finding in caught.value.findings} == {code}
    assert path.name in str(caught.value)
    return str(caught.value)
