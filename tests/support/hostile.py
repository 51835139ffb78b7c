"""Hostile input of every kind that is read, each made from one source of randomness.

The quick suite (`test_hostile.py`) draws some of it, `tools/fuzz.py` as much as time allows.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from artifacts import pack, with_header, with_recipe
from giants import GIANTS
from guarded import OF_MODULES, Guarded, assert_unchanged, objects_of, state_of
from places import ROOT

import qrecipe
from qrecipe.artifact.container import Entry, Header, read_header
from qrecipe.authoring.lock.file import read_lock
from qrecipe.errors.findings import QRecipeError
from qrecipe.recipe.patterns import NamePatterns, is_exact

RECIPES = ROOT / "recipes"
SEEDS = tuple(path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.toml")))
SECRET = "secret_outside_of_the_tree"

ODD_TEXTS = (
    *("", " ", "\0", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "🎉" * 50, "e\u0301", "ﬀ", "İ"),
    *("x" * 5_000, "." * 300, "*" * 300, "{" * 50, "[" * 50, "**", "a.**", "**.**", "{a,b}" * 40),
    *("__import__('os').system('true')", "os.system", "builtins.eval", "/etc/passwd", "%s%n"),
    *("float", "inherit", "int8", "minmax", "global", "torch.nn.Linear", "torch.add", "../x", "#"),
    *("builtin:x86-static", "./a.toml", "QR214", "-", "'", '"', "\\", "\n", "]]", "= 1"),
)
ODD_VALUES = (
    *("nan", "-inf", "inf", "1e999", "-0.0", "9" * 30, "9" * 5_000, "0x" + "f" * 40, "-1", "0"),
    *("true", "1979-05-27", "07:32:00", "[]", "{}", "[[]]", "[{}]", "{a.b.c=1}", "'''a\nb'''"),
    *('"""\\"""', "[" * 99 + "]" * 99, "[" * 101 + "]" * 101, "{a=" * 101 + "1" + "}" * 101),
    *("'int8'", "'x86'", "1", "128", "255", "1.5", "nonsense", "'" + "x" * 3_000 + "'", "0o17"),
)
ODD_LINES = (
    *("[rules]", "[rules.module_name]", "[[tensor.a]]", "[[rules]]", "[a.b.c.d]", "[", "]", "[]"),
    *("[tensor.weight.observer]", "extends = 'builtin:x86-static'", "format = 2", "format = true"),
    *("extends = ['./a.toml', {recipe='./b.toml', sha256='" + "0" * 64 + "'}]", "#" * 2_000),
    *("[" + ".".join("a" * 200) + "]", ".".join("a" * 200) + " = 1", "\x00", "\t", "<<<<<<< HEAD"),
)
ODD_REFERENCES = (
    *("../a.toml", "../../../../../../etc/passwd", "/etc/passwd", "//host/share/a.toml"),
    *(r"\\server\share\a.toml", "C:\\a.toml", "c:a.toml", "C:/a.toml", "file:///etc/passwd"),
    *("file:a.toml", "http://localhost/a.toml", "~/a.toml", "~root/a.toml", "./\0", "./a\0.toml"),
    *("./" + "a" * 300, "./" + "a/" * 3_000 + "a.toml", "../" * 2_000, "builtin:../x", "builtin:"),
    *("builtin:nothing", "builtin:x86-static", "pip:x", "pydantic:main", "nothing-at-all:x", ""),
    *(".", "..", "./", "./.", "./..", "./.git", "./folder", "./pipe", "./a.toml/.", "./a.toml/b"),
    *(
        "./dangling",
        "./loop",
        "./out.toml",
        "./outside/secret.toml",
        "./up/secret.toml",
        "./A.TOML",
    ),
    *(
        "./%2e%2e/secret.toml",
        "./..\\secret.toml",
        "./a.toml ",
        "./\u2024\u2024/a.toml",
        "./\ud800",
    ),
    *("/proc/self/environ", "/dev/zero", "./zero", "qrecipe:x", "./big.toml", "./null.toml"),
)
ALPHABET = string.ascii_letters + string.digits + ".:#*?[]{},-_!^\\ é🎉\x00\n\t\"'"


@dataclass(frozen=True)
class Outcome:
    """What a case came to: how many files it read, and what was found in them."""

    files: int
    codes: tuple[str, ...]


def outcome(files: int, read: Callable[[], object]) -> Outcome:
    """Of reading something hostile. Any error but ours is a leak, and goes on."""
    try:
        read()
    except QRecipeError as error:
        said = str(error)
        said.encode()  # no half characters
        assert SECRET not in said, "a file outside of the tree was read"
        json.dumps([finding.to_json() for finding in error.findings])
        codes = {finding.code for finding in error.findings}
        return Outcome(files, tuple(sorted(codes)) or _leak("an error without a finding"))
    return Outcome(files, ("accepted",))


def _leak(what: str) -> NoReturn:
    raise AssertionError(what)


# --- texts


def text(random: Random) -> str:
    kind = random.randrange(4)
    if kind == 0:
        return random.choice(ODD_TEXTS)
    if kind == 1:
        return "".join(random.choices(ALPHABET, k=random.randrange(40)))
    if kind == 2:
        return "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(8)))
    return random.choice(ODD_TEXTS)[:50] + random.choice(ODD_TEXTS)[:50]


def quoted(value: str) -> str:
    """A text as TOML writes it, mostly well."""
    return json.dumps(value.replace("\ud800", "\\ud800"), ensure_ascii=False).replace("\x7f", "")


def recipe_text(random: Random) -> str:
    """A shipped recipe after some mutations, or a giant."""
    if random.random() < 0.01:
        return random.choice(list(GIANTS.values()))()
    lines = random.choice(SEEDS).split("\n")
    for _ in range(random.choice((1, 1, 2, 3, 5, 10, 30))):
        random.choice(MUTATIONS)(random, lines)
        lines = lines or [""]
    return random.choice(("\n", "\n", "\n", "\r\n")).join(lines)


def _deleted(random: Random, lines: list[str]) -> None:
    del lines[random.randrange(len(lines))]


def _repeated(random: Random, lines: list[str]) -> None:
    line = random.choice(lines)
    for _ in range(random.choice((1, 1, 1, 50))):
        lines.insert(random.randrange(len(lines) + 1), line)


def _swapped(random: Random, lines: list[str]) -> None:
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


def _odd_line(random: Random, lines: list[str]) -> None:
    lines.insert(random.randrange(len(lines) + 1), random.choice(ODD_LINES))


def _other_value(random: Random, lines: list[str]) -> None:
    index = random.randrange(len(lines))
    key, equals, _ = lines[index].partition("=")
    if equals:
        value = random.choice((quoted(text(random)), random.choice(ODD_VALUES)))
        lines[index] = f"{key}= {value}"


def _other_key(random: Random, lines: list[str]) -> None:
    index = random.randrange(len(lines))
    _, equals, value = lines[index].partition("=")
    if equals:
        keys = [quoted(text(random)) for _ in range(random.choice((1, 1, 2, 5)))]
        lines[index] = f"{'.'.join(keys)} ={value}"


def _other_header(random: Random, lines: list[str]) -> None:
    name = random.choice(("tensor", "qconfig", "rules", "fx", "lint", quoted(text(random))))
    inner = random.choice(("", f".{quoted(text(random))}", ".weight", ".module_name"))
    lines.insert(
        random.randrange(len(lines) + 1), random.choice(("[{}]", "[[{}]]")).format(name + inner)
    )


def _rules(random: Random, lines: list[str]) -> None:
    tier = random.choice(("module_name", "module_type", "function", "global"))
    values = ("'float'", "'inherit'", "{weight='weight'}", "{expect=-1}", random.choice(ODD_VALUES))
    lines.append(f"[rules.{tier}]")
    lines += (
        f"{quoted(random.choice((pattern, text))(random))} = {random.choice(values)}"
        for _ in range(random.choice((1, 3, 100)))
    )


def _extended(random: Random, lines: list[str]) -> None:
    lines.insert(0, f"extends = {quoted(reference(random))}")


def _character(random: Random, lines: list[str]) -> None:
    index = random.randrange(len(lines))
    at = random.randrange(len(lines[index]) + 1)
    character = random.choice((chr(random.randrange(0x3000)), random.choice("[]{}=.,'\"#\\\r\0")))
    end = at + random.randrange(2)
    lines[index] = lines[index][:at] + character + lines[index][end:]


def _cut(random: Random, lines: list[str]) -> None:
    del lines[random.randrange(len(lines)) :]


MUTATIONS: tuple[Callable[[Random, list[str]], None], ...] = (
    *(_deleted, _repeated, _swapped, _odd_line, _other_value, _other_value, _other_key),
    *(_other_header, _rules, _extended, _character, _character, _cut),
)


def recipe_case(random: Random, folder: Path) -> Outcome:
    content = recipe_text(random)
    if random.random() < 0.5:
        return outcome(1, lambda: _used(qrecipe.parse_recipe(content)))
    path = folder / "alone" / "recipe.toml"
    path.parent.mkdir(exist_ok=True)
    data = bytearray(content.encode("utf-8", "surrogatepass") or b"x")
    for _ in range(random.choice((0, 0, 0, 1, 5))):
        data[random.randrange(len(data)) : random.randrange(len(data) + 1)] = random.randbytes(2)
        data = data or bytearray(b"x")
    path.write_bytes(data)
    return outcome(1, lambda: _used(qrecipe.load_recipe(path)))


def _used(recipe: qrecipe.Recipe) -> None:
    """What a sound recipe is used for without a model."""
    if len(recipe.rules) < 1_000:
        again = qrecipe.parse_recipe(recipe.to_toml())
        assert again.fingerprint == recipe.fingerprint, "written back it is another recipe"


# --- references

FILES = ("a.toml", "b.toml", "c.toml", "folder/d.toml", "folder/deep/e.toml")


def reference(random: Random) -> str:
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(("./", "../", "./folder/", "../folder/")) + text(random)
    if kind == 1:
        steps = random.choices(
            ("..", ".", "folder", "up", "inside", "", "a.toml"), k=random.randrange(9)
        )
        return "./" + "/".join(steps)
    if kind == 2:
        return random.choice(("./", "../", "../../")) + random.choice(FILES)
    return random.choice(ODD_REFERENCES)


def plant(folder: Path) -> Path:
    """A tree with links of all kinds, and what lies outside of it; returns the tree."""
    tree = folder / "tree"
    (tree / "folder" / "deep").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    outside = folder / "outside"
    outside.mkdir()
    for place in (folder / "secret.toml", outside / "secret.toml"):
        place.write_text(f'format = 1\nname = "{SECRET}"\n{SECRET}\n')
    links = {
        "out.toml": "../secret.toml",
        "outside": str(outside),
        "up": "..",
        "folder/up": "../..",
        "inside": "folder",
        "loop": "loop",
        "circle": "circle2",
        "circle2": "circle",
        "dangling": "nowhere",
        "zero": "/dev/zero",
        "passwd": "/etc/passwd",
        "link.toml": "a.toml",
    }
    for name, target in links.items():
        (tree / name).symlink_to(target)
    os.mkfifo(tree / "pipe")
    (tree / "null.toml").write_bytes(b"format = 1\0")
    (tree / "big.toml").write_bytes(b"#" * (2**20 + 1))
    return tree


LINKS = ("link.toml", "out.toml", "inside/d.toml", "up/secret.toml", "outside/secret.toml")


def reference_case(random: Random, folder: Path) -> Outcome:
    """A small tree of recipes that extend each other and more."""
    tree = folder / "tree"
    if not tree.exists():
        plant(folder)
    for name in FILES:
        (tree / name).write_text(extending(random), encoding="utf-8", errors="surrogatepass")
    top = tree / random.choice(FILES)
    return outcome(len(FILES), lambda: _confined(qrecipe.load_recipe(top)))


def extending(random: Random) -> str:
    references = [
        random.choice((reference, lambda r: "./" + r.choice((*FILES, *LINKS))))(random)
        for _ in range(random.choice((0, 1, 1, 2, 3, 40)))
    ]
    written = [quoted(each) for each in references]
    if written and random.random() < 0.1:
        written[0] = f"{{ recipe = {written[0]}, sha256 = '{'0' * 64}' }}"
    values = [f"name = {quoted(text(random))}"] if random.random() < 0.3 else []
    rules = [f"{quoted(random.choice('abc'))} = 'float'", "z = 'inherit'"]
    return "\n".join(
        [
            "format = 1\nbackend = 'x86'",
            *values,
            f"extends = [{', '.join(written)}]",
            "[rules]\nglobal = 'float'\n[rules.module_name]",
            *random.sample(rules, random.randrange(2)),
        ]
    )


def _confined(recipe: qrecipe.Recipe) -> None:
    assert SECRET not in recipe.to_toml(), "a recipe outside of the tree was read"


# --- globs


def pattern(random: Random) -> str:
    pieces = (
        *(
            "*",
            "**",
            "?",
            ".",
            ".**",
            "**.",
            "{a,b}",
            "{a*,?b}",
            "[ab]",
            "[a-z]",
            "[*]",
            "layer",
            "a",
        ),
        *(
            "1",
            ":",
            "#",
            ":add",
            "#1",
            "#*",
            "{",
            "}",
            "[",
            "]",
            ",",
            "-",
            "!",
            "\\",
            "é",
            "🎉",
            "\0",
        ),
    )
    return "".join(random.choices(pieces, k=random.choice((1, 2, 4, 8, 30, 200, 600))))


def site_name(random: Random) -> str:
    parts = random.choices(
        ("layer1", "0", "conv", "a", "b", "", "é"), k=random.choice((1, 2, 3, 60))
    )
    call = random.choice(("", "", ":add", ":", "#1", ":add#1", "#"))
    return random.choice((".", ".", "")).join(parts) + call + random.choice(("", "a" * 2_000))


def pattern_case(random: Random, folder: Path) -> Outcome:
    """One pattern against fifty names, some of them twice."""
    written = random.choice((pattern, text))(random)
    names = [site_name(random) for _ in range(50)]

    def match() -> None:
        patterns = NamePatterns([written])
        verdicts = list(map(patterns.selecting, names))
        assert verdicts == list(map(patterns.selecting, names)), "a pattern that remembers"
        if is_exact(written) and not written.endswith(".**") and "#" not in written:
            name = re.sub(r"\[(.)\]", r"\1", written)  # one letter in brackets is that letter
            assert patterns.matching(name), "an exact name does not match itself"

    return outcome(1, match)


# --- lock files


def lock_case(random: Random, folder: Path, good: str) -> Outcome:
    lines = good.split("\n")
    for _ in range(random.choice((1, 1, 2, 5, 30))):
        random.choice(MUTATIONS)(random, lines)
        lines = lines or [""]
    content = "\n".join(lines)
    if random.random() < 0.005:
        content = random.choice(list(GIANTS.values()))()
    path = folder / "recipe.lock"
    path.write_text(content, encoding="utf-8", errors="surrogatepass", newline="")
    return outcome(1, lambda: read_lock(path))


# --- artifacts

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
    metadata[key] = pack(value) if key in _PACKED else json.dumps(value)


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
