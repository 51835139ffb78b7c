"""Hostile artifacts, made from one source of randomness: damaged, forged, or meddling."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from artifacts import pack, with_header, with_recipe
from guarded import OF_MODULES, Guarded, assert_unchanged, objects_of, state_of
from hostile import MUTATIONS, Outcome, outcome, text

import qrecipe
from qrecipe.artifact.container import Entry, Header, read_header
from qrecipe.errors.findings import QRecipeError

_PACKED = ("plan", "architecture")


def artifact_case(
    random: Random, folder: Path, good: bytes, load: Callable[[Path], object]
) -> Outcome:
    path = folder / "model.safetensors"
    path.write_bytes(random.choice((_damaged, _forged, _forged, _forged))(random, good))
    return outcome(1, lambda: load(path))


def _damaged(random: Random, good: bytes) -> bytes:
    """A file with wrong bytes, and so with the wrong checksum."""
    content = bytearray(good)
    for _ in range(random.choice((1, 1, 3, 20))):
        at = random.randrange(len(content))
        kind = random.randrange(4)
        if kind == 0:
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            content[at:at] = random.randbytes(random.randrange(1, 9))
        elif kind == 2:
            del content[at : at + random.randrange(1, 50)]
        else:
            at = random.randrange(8)
            content[at : at + 1] = random.randbytes(1)
        content = content or bytearray(1)
    return bytes(content[: random.randrange(len(content))] if random.random() < 0.1 else content)


def _forged(random: Random, good: bytes) -> bytes:
    """A file with other contents and the right checksum."""
    header = read_header(io.BytesIO(good), len(good), "good")
    tensors, metadata = dict(header.tensors), dict(header.metadata)
    content = bytearray(good[header.start :])
    for _ in range(random.choice((1, 1, 2, 5))):
        random.choice((_forge_metadata, _forge_metadata, _forge_tensors, _forge_content))(
            random, tensors, metadata, content
        )
    try:
        return with_header(tensors, metadata, bytes(content))
    except (ValueError, UnicodeError):  # offsets that no file can have
        return good


def _forge_metadata(
    random: Random, tensors: dict[str, Entry], metadata: dict[str, str], content: bytearray
) -> None:
    key = random.choice(sorted(metadata))
    kind = random.randrange(6)
    if kind == 0:
        del metadata[key]
        metadata.setdefault("format", "qrecipe 1")
    elif kind == 1:
        metadata[key] = text(random).encode("utf-8", "replace").decode()
    elif kind == 2:
        metadata["plan"] = base64.b64encode(zlib.compress(bytes(2**24), 1)).decode()
    elif kind == 3:
        lines = metadata.get("recipe", "").split("\n")
        random.choice(MUTATIONS)(random, lines)
        metadata["recipe"] = "\n".join(lines).encode("utf-8", "replace").decode()
    else:
        _forge_json(
            random, metadata, random.choice((*_PACKED, *_PACKED, "needs", "aliases", "layouts"))
        )


def _forge_json(random: Random, metadata: dict[str, str], key: str) -> None:
    try:
        packed = metadata[key]
        written = _unpacked(packed) if key in _PACKED else packed
        value = json.loads(written)
    except (KeyError, ValueError, zlib.error, UnicodeError, RecursionError):
        return
    value = _mutated(random, value)
    written = json.dumps(value)
    if random.random() < 0.05:
        written = random.choice(("[" * 5_000, "[" * 50 + "]" * 50, "1" * 5_000, "NaN", "{}", "[]"))
    metadata[key] = pack(written) if key in _PACKED else written


ODD_JSON: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        [],
        {},
        [[]],
        "fc1",
        "..",
        "",
    ),
    *(
        "torch.nn.Linear",
        "os.system",
        "__class__",
        "fc1.weight",
        "eval",
        [0] * 100,
        {"a": {"b": 1}},
    ),
    *(
        "x86",
        "onednn",
        "static",
        "float",
        "__import__('os').system('true')",
        "x" * 10_000,
        "\x1b[2J",
    ),
)


def _mutated(random: Random, value: Any) -> Any:
    """The value with one place in it changed."""
    if random.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return random.choice(ODD_JSON)
    steps: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    step = random.choice(steps)
    kind = random.randrange(8)
    if kind == 0:
        del value[step]
    elif kind == 1 and isinstance(value, list):
        value.insert(step, value[random.randrange(len(value))])
    elif kind == 1:
        value[text(random).encode("utf-8", "replace").decode()] = value[step]
    else:
        value[step] = _mutated(random, value[step])
    return value


def _forge_tensors(
    random: Random, tensors: dict[str, Entry], metadata: dict[str, str], content: bytearray
) -> None:
    name = random.choice(sorted(tensors))
    entry = tensors[name]
    kind = random.randrange(5)
    if kind == 0:
        tensors[text(random).encode("utf-8", "replace").decode()] = tensors.pop(name)
    elif kind == 1:
        dtype = random.choice(("BOOL", "U8", "I8", "F16", "F32", "F64", "I64", "BF16"))
        tensors[name] = entry.model_copy(update={"dtype": dtype})
    elif kind == 2:
        shape = random.choice(((), (0,), (1, *entry.shape), entry.shape[::-1], (2**40, 2**40)))
        tensors[name] = entry.model_copy(update={"shape": shape})
    elif kind == 3:
        other = random.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], entry
    else:
        end = len(content)
        tensors[f"{name}.more"] = Entry(dtype="U8", shape=(4,), data_offsets=(end, end + 4))
        content += bytes(4)


def _forge_content(
    random: Random, tensors: dict[str, Entry], metadata: dict[str, str], content: bytearray
) -> None:
    if not content:
        return
    entry = tensors[random.choice(sorted(tensors))]
    start, stop = entry.data_offsets
    odd = random.choice(
        (b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, b"\0\0\xc0\x7f" * 2, random.randbytes(8))
    )
    content[start:stop] = (odd * (1 + (stop - start) // 8))[: stop - start]


# --- artifacts that are sound but for what they say

_FX_KEYS = (
    *("preserved_attributes",) * 3,
    *("roots", "non_traceable_module_name", "non_traceable_module_class"),
)
_ODD_NAMES = (
    *OF_MODULES,
    *("boom", "helper", "notes", "class_names", "KINDS", "offset", "gain", "spare", "fc1", "fc2"),
    *("fc1.weight", "fc1._parameters", "__main__", "torch.nn.Linear", "guarded.Guarded", ""),
)


def attack_case(random: Random, folder: Path, good: bytes) -> Outcome:
    """A file of the model `Guarded` that wants to reach into the model that it is loaded for.

    Its checksum and fingerprints are right; its recipe, plan and tables are not those of the model.
    """
    header = read_header(io.BytesIO(good), len(good), "good")
    metadata = dict(header.metadata)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice((_attack_recipe, _attack_recipe, _attack_table))(random, metadata)
    path = folder / "attack.safetensors"
    path.write_bytes(with_header(header.tensors, metadata, good[header.start :]))
    model = Guarded().train(random.random() < 0.5)
    before = state_of(model)

    def load() -> None:
        loaded = qrecipe.load_quantized(path, model)
        shared = objects_of(model).keys() & objects_of(loaded).keys()
        assert not shared, "the loaded model has something of the given one"

    found = outcome(1, load)
    assert_unchanged(model, before)
    return found


def _attack_recipe(random: Random, metadata: dict[str, str]) -> None:
    names = random.choices(_ODD_NAMES, k=random.choice((1, 1, 2, 5)))
    lines = metadata["recipe"].split("\n")
    if random.random() < 0.7:
        lines += ["[fx]", f"{random.choice(_FX_KEYS)} = {json.dumps(names)}"]
    else:
        random.choice(MUTATIONS)(random, lines)
    try:
        metadata.update(with_recipe(metadata, "\n".join(lines)))
    except (QRecipeError, UnicodeError, ValueError):
        return  # `artifact_case` has the recipes that are none


def _attack_table(random: Random, metadata: dict[str, str]) -> None:
    """One place in the plan, in the record of the model, or in another table."""
    key = random.choice(("plan", "plan", "architecture", "aliases", "layouts", "versions"))
    written = _unpacked(metadata[key]) if key in _PACKED else metadata[key]
    value = _renamed(random, json.loads(written)) or _mutated(random, json.loads(written))
    written = json.dumps(value)
    metadata[key] = pack(written) if key in _PACKED else written


def _renamed(random: Random, value: Any) -> Any:
    """The value with one of its texts replaced by a name of modules; None if it has no text."""
    changed = list(_each_changed(value, random.choice(_ODD_NAMES)))
    return random.choice(changed) if changed and random.random() < 0.7 else None


def with_text_everywhere(good: bytes, written: str) -> Iterator[bytes]:
    """The file with that text in the place of one text of its metadata, for each of them."""
    header = read_header(io.BytesIO(good), len(good), "good")
    content = good[header.start :]
    for key, value in header.metadata.items():
        yield with_header(header.tensors, {**header.metadata, key: written}, content)
        if key not in _PACKED:
            continue
        for changed in _each_changed(json.loads(_unpacked(value)), written):
            metadata = {**header.metadata, key: pack(json.dumps(changed))}
            yield with_header(header.tensors, metadata, content)


def _each_changed(value: Any, written: str) -> Iterator[Any]:
    if isinstance(value, str):
        yield written
    steps = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for step in steps:
        for changed in _each_changed(value[step], written):
            copy = value.copy()
            copy[step] = changed
            yield copy


def artifact_bombs(good: bytes) -> Iterator[bytes]:
    """Files whose metadata unpack to much more than they are."""
    header = read_header(io.BytesIO(good), len(good), "good")
    content = good[header.start :]
    for bomb in (
        " " * 2**26,
        "[" * 2**22,
        "[" + "[]," * 2**22 + "[]]",
        "[" + "1," * 2**23 + "1]",
        "{" + ",".join(f'"k{index:x}":1' for index in range(2**18)) + "}",
    ):
        for key in _PACKED:
            yield with_header(header.tensors, {**header.metadata, key: pack(bomb)}, content)


def _unpacked(packed: str) -> str:
    return zlib.decompress(base64.b64decode(packed)).decode()


def every_text(header: Header) -> Iterator[str]:
    """The metadata of a file, unpacked."""
    for key, value in header.metadata.items():
        yield _unpacked(value) if key in _PACKED else value
